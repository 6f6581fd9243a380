from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from e3va_cli.data.formats.class_names import read_class_names
from e3va_cli.errors import UserError

TABLE = "Idx\tRatio\tTrain\tVal\tStuff\tName\n1\t0.2\t11\t1\t1\twall\n2\t0.1\t6\t6\t1\tbuilding, edifice\n"


def test_a_list_as_it_is() -> None:
    assert read_class_names(["owl", "dining table", "cat"]) == ["owl", "dining table", "cat"]
    assert read_class_names(("owl",)) == ["owl"]


@pytest.mark.parametrize(
    "text", ["owl\ndining table\ncat\n", "\ufeffowl\r\ndining table\r\n\r\ncat", " owl \n\n dining table\ncat \n\n"]
)
def test_a_file_of_names(tmp_path: Path, text: str) -> None:
    file = tmp_path / "classes.txt"
    file.write_bytes(text.encode())
    assert read_class_names(str(file)) == ["owl", "dining table", "cat"]


@pytest.mark.parametrize("text", [TABLE, TABLE.replace(", ", ";"), TABLE.replace("\tStuff", "").replace("\t1\t", "\t")])
def test_ade20k_s_table(tmp_path: Path, text: str) -> None:
    file = tmp_path / "objectInfo.txt"
    file.write_text(text)
    assert read_class_names(str(file))[1:] == ["building"]
    assert read_class_names(str(file))[0] == "wall"


def test_ade20k_s_own_file(real_data: Callable[[str], Path]) -> None:
    names = read_class_names(str(real_data("ade_sample/ADEChallengeData2016/objectInfo150.txt")))
    assert len(names) == len(set(names)) == 150
    assert names[:4] == ["wall", "building", "sky", "floor"]
    assert names[-1] == "flag"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"", "has no class names"),
        (b"\n \n", "has no class names"),
        (b"owl\ncat\nowl\n", "duplicate class names: owl"),
        (b"\x89PNG\r\n\x1a\n", "not UTF-8 text"),
        (b"Idx\tRatio\tName\n1\t0.5\n", "class 1 of the table has no name"),
        (TABLE.replace("building", "wall").encode(), "duplicate class names: wall"),
    ],
)
def test_invalid_files(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "classes.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_class_names(str(file))
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "has no class names"),
        (["owl", ""], "not ''"),
        (["owl", 3], "not 3; put it in quotes"),
        ([None], "not None"),
        (["owl", "cat", "owl", "cat"], "duplicate class names: owl, cat"),
        (["owl", " owl"], "duplicate class names: owl"),
        (7, "dataset.classes=7"),
        ({"owl": 1}, "one name a line"),
        ("", "cannot read"),
        ("a\0b", "cannot read"),
    ],
)
def test_invalid_lists(given: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_class_names(given)
