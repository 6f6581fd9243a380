"""The packages that this one needs: their lowest versions, those that are installed here, and their licences.

    python scripts/dependencies.py lowest > constraints/lowest.txt   # the lower bounds, developers' tools left out
    python scripts/dependencies.py newest > constraints/newest.txt   # this environment, what they need in turn included
    python scripts/dependencies.py licences                          # the table of docs/reliability.md

Either file is for `pip install --constraint FILE`: names and versions alone, from whatever index pip is set to.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
EXTRAS = ("onnx", "dev")
OURS = "e3va-cli"


def required(extras: tuple[str, ...] = EXTRAS) -> list[Requirement]:
    """What pyproject.toml asks for, with these extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    words = [*project["dependencies"], *(word for extra in extras for word in project["optional-dependencies"][extra])]
    found = [Requirement(word) for word in words]
    return [requirement for requirement in found if requirement.name != OURS]


def lowest(requirement: Requirement) -> str:
    """The version that a requirement starts with."""
    (bound,) = (one.version for one in requirement.specifier if one.operator == ">=")
    return bound


def needed_by(requirement: Requirement, found: dict[str, Distribution]) -> None:
    """Add what a requirement means here, and what that needs in turn, to `found`."""
    name = canonicalize_name(requirement.name)
    extras = {"", *requirement.extras}
    try:
        installed = distribution(name)
    except PackageNotFoundError:  # an extra that is not installed
        return
    if name in found and not requirement.extras:
        return
    found[name] = installed
    for further in map(Requirement, installed.requires or ()):
        if further.marker is None or any(further.marker.evaluate({"extra": extra}) for extra in extras):
            needed_by(further, found)


def installed_here() -> dict[str, Distribution]:
    """All packages that this one needs, in turn too, by name."""
    found: dict[str, Distribution] = {}
    for requirement in required():
        needed_by(requirement, found)
    return dict(sorted(found.items()))


def licence(package: Distribution) -> str:
    """As a package declares it: an expression, classifiers, or a word; where it has but a text, its first line."""
    metadata = package.metadata
    for expression in metadata.get_all("License-Expression") or ():
        return str(expression)
    prefix = "License :: "
    classifiers = [c for c in metadata.get_all("Classifier") or () if c.startswith(prefix)]
    if classifiers:
        return ", ".join(c.rpartition(" :: ")[2] for c in classifiers)
    texts = [file for file in package.files or () if file.name.startswith("LICENSE")]
    words = [*(metadata.get_all("License") or ()), *(text.read_text() for text in texts), "not declared"]
    return str(words[0]).strip().splitlines()[0]


def licences() -> Iterator[str]:
    """A Markdown table of the packages that pyproject.toml names."""
    yield "| package | from | tried up to | licence, as declared |"
    yield "|---|---|---|---|"
    here = installed_here()
    for requirement in required():
        package = here[canonicalize_name(requirement.name)]
        yield f"| {requirement.name} | {lowest(requirement)} | {package.version} | {licence(package)} |"


def main() -> None:
    """Print what is asked for."""
    lines = {
        "lowest": lambda: (f"{one.name}=={lowest(one)}" for one in required(("onnx",))),
        "newest": lambda: (f"{name}=={package.version}" for name, package in installed_here().items()),
        "licences": licences,
    }
    if len(sys.argv) != 2 or sys.argv[1] not in lines:
        sys.exit(f"say one of {', '.join(lines)}")
    print(*lines[sys.argv[1]](), sep="\n")


if __name__ == "__main__":
    main()
