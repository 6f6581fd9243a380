"""Every shipped YAML composes, and names the commands that use it."""

from pathlib import Path

import e3va_cli.conf
import pytest

from e3va_cli.adapters import METHODS
from e3va_cli.composition import checked
from e3va_cli.config import register_schemas
from e3va_cli.data.source import SOURCES
from e3va_cli.heads import HEADS

CONF = Path(next(iter(e3va_cli.conf.__path__)))
GROUPED = sorted(p.relative_to(CONF) for p in CONF.glob("*/*.yaml"))
ROOT = ["dataset.root=x"]


@pytest.mark.parametrize("path", GROUPED, ids=str)
def test_every_choice_composes(path):
    register_schemas()
    group, name = path.parts[0], path.stem
    words = [f"{group}={name}"]
    text = (CONF / path).read_text()
    checked("train", [*words, *(ROOT if "dataset.root=" in text else [])])


@pytest.mark.parametrize(
    "path", [p for p in GROUPED if p.parts[0] in ("backbone", "adapter", "head", "dataset")], ids=str
)
def test_a_choice_opens_with_the_command_that_uses_it(path):
    head = (CONF / path).read_text().splitlines()[:3]
    assert any(line.startswith("# e3va train") for line in head)


def test_registries_and_choices_agree():
    names = {group: {p.stem for p in (CONF / group).glob("*.yaml")} for group in ("adapter", "dataset", "head")}
    assert set(METHODS) == names["adapter"]
    assert set(SOURCES) == names["dataset"]
    assert set(HEADS) <= names["head"]
