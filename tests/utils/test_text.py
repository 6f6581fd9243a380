from e3va_cli.utils.text import and_more, truncate_list


def test_a_few_are_named_and_the_others_counted():
    assert truncate_list([], 2) == ""
    assert truncate_list([1, 2], 2) == "1, 2"
    assert truncate_list(["a", "b", "c"], 2) == "a, b and 1 more"


def test_how_many_there_are_beside_the_first():
    assert and_more(["a"]) == "" and and_more("abc") == " (and 2 more)"
