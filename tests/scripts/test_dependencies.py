"""The files in constraints/ agree with pyproject.toml and have only names and versions."""

from pathlib import Path

import pytest
from packaging.requirements import Requirement

from scripts.dependencies import required

CONSTRAINTS = Path(__file__).parents[2] / "constraints"


def pins(name):
    return {one.name: one for one in map(Requirement, (CONSTRAINTS / name).read_text().split())}


@pytest.mark.parametrize("name", ["lowest.txt", "newest.txt"])
def test_only_names_and_versions(name):
    for one in pins(name).values():
        assert one.url is None and [part.operator for part in one.specifier] == ["=="]


def test_lowest_are_the_lower_bounds():
    lowest = pins("lowest.txt")
    wanted = {one.name: one for one in required(("onnx",))}
    assert set(lowest) == set(wanted)
    for name, one in wanted.items():
        assert f">={next(iter(lowest[name].specifier)).version}" in str(one.specifier)


def test_newest_are_allowed():
    newest = pins("newest.txt")
    for one in required():
        (pin,) = newest[one.name].specifier
        assert one.specifier.contains(pin.version)
