from e3va_cli.utils.text import more_suffix, truncate_list


def test_a_few_are_named_and_the_others_counted():
    assert truncate_list([], 2) == ""
    assert truncate_list([1, 2], 2) == "1, 2"
    assert truncate_list(["a", "b", "c"], 2) == "a, b and 1 more"


def test_how_many_there_are_beside_the_first():
    assert more_suffix(["a"]) == "" and more_suffix("abc") == " (and 2 more)"
