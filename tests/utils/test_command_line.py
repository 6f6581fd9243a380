"""What is printed to be pasted comes back as it was, through a shell and through Hydra."""

import shlex

import pytest

from e3va_cli.config.composition import parse
from e3va_cli.utils.command_line import format_command

PATHS = [
    "/runs/a",
    "runs/my photos (1)",
    "a=b,c",
    "it's",
    'say "x"',
    "$HOME/`x`",
    "back\\slash",
    "[1]",
    "null",
    "7",
    "ü",
]


@pytest.mark.parametrize("path", PATHS)
def test_a_path_of_any_characters(path):
    words = shlex.split(format_command("train", {"resume": path, "trainer.max_steps": 4, "schedule.iterations": None}))
    assert words[:2] == ["e3va", "train"]
    assert [one.value() for one in parse(words[2:])] == [path, 4, None]


def test_plain_names_stay_plain():
    line = format_command("predict", {"checkpoint": "runs/a-1", "input": "IMAGES", "x": False})
    assert line == "e3va predict checkpoint=runs/a-1 input=IMAGES x=false"
