"""Print the dependencies: lowest versions, installed versions, and licenses.

    python scripts/dependencies.py lowest > constraints/lowest.txt   # the lower bounds, without development tools
    python scripts/dependencies.py newest > constraints/newest.txt   # installed versions, with transitive dependencies
    python scripts/dependencies.py licenses                          # the table of docs/reliability.md

The files are for `pip install --constraint FILE`.
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
    """Return the requirements of pyproject.toml, with these extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    return [requirement for requirement in map(Requirement, lines) if requirement.name != OURS]


def lowest(requirement: Requirement) -> str:
    """Return the lower bound of a requirement."""
    (bound,) = (one.version for one in requirement.specifier if one.operator == ">=")
    return bound


def add_installed(requirement: Requirement, packages: dict[str, Distribution]) -> None:
    """Add the installed package of a requirement, and its dependencies, to `packages`."""
    name = canonicalize_name(requirement.name)
    extras = {"", *requirement.extras}
    try:
        installed = distribution(name)
    except PackageNotFoundError:  # an extra that is not installed
        return
    if name in packages and not requirement.extras:
        return
    packages[name] = installed
    for further in map(Requirement, installed.requires or ()):
        if further.marker is None or any(further.marker.evaluate({"extra": extra}) for extra in extras):
            add_installed(further, packages)


def installed_packages() -> dict[str, Distribution]:
    """Return all dependencies by name, transitive ones included."""
    packages: dict[str, Distribution] = {}
    for requirement in required():
        add_installed(requirement, packages)
    return dict(sorted(packages.items()))


def license_of(package: Distribution) -> str:
    """Return the declared license: expression, classifiers, or first line of its text."""
    metadata = package.metadata
    for expression in metadata.get_all("License-Expression") or ():
        return str(expression)
    prefix = "License :: "
    classifiers = [c for c in metadata.get_all("Classifier") or () if c.startswith(prefix)]
    if classifiers:
        return ", ".join(c.rpartition(" :: ")[2] for c in classifiers)
    texts = [file for file in package.files or () if file.name.startswith("LICENSE")]
    declared = [*(metadata.get_all("License") or ()), *(text.read_text() for text in texts), "not declared"]
    return str(declared[0]).strip().splitlines()[0]


def licenses() -> Iterator[str]:
    """Yield a Markdown table of the requirements of pyproject.toml."""
    yield "| package | from | tested up to | declared license |"
    yield "|---|---|---|---|"
    installed = installed_packages()
    for requirement in required():
        package = installed[canonicalize_name(requirement.name)]
        yield f"| {requirement.name} | {lowest(requirement)} | {package.version} | {license_of(package)} |"


def main() -> None:
    """Print the chosen list."""
    lines = {
        "lowest": lambda: (f"{one.name}=={lowest(one)}" for one in required(("onnx",))),
        "newest": lambda: (f"{name}=={package.version}" for name, package in installed_packages().items()),
        "licenses": licenses,
    }
    if len(sys.argv) != 2 or sys.argv[1] not in lines:
        sys.exit(f"usage: dependencies.py {'|'.join(lines)}")
    print(*lines[sys.argv[1]](), sep="\n")


if __name__ == "__main__":
    main()
