"""Imports run downwards only, without cycles, and private parts of other packages stand in few places."""

import ast
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import e3va_cli

PACKAGE = Path(e3va_cli.__file__).parent
LEVELS = [
    {"errors"},
    {"utils"},
    {"components", "runs", "visualization"},
    {"data", "models.backbones", "models.necks"},
    {"models.adapters", "models.heads", "optim"},
    {"models"},
    {"config", "evaluation"},
    {"memory", "training"},
    {"export", "paper"},
    {"inference"},
    {"commands"},
    {"api", "cli"},
    {"__init__", "__main__"},
]
SUBPACKAGES = ("models",)  # whose parts have levels of their own
STRANGERS = [{"models.heads", "models.adapters"}, {"models.heads", "data"}, {"models.adapters", "data"}]
PRIVATE = {  # what has no public name; each line breaks where another version moves it
    "hydra._internal.utils": {"config/hydra_private.py"},
    "lightning.pytorch.plugins.precision.amp._optimizer_handles_unscaling": {"training/lightning_private.py"},
    "lightning.pytorch.strategies.launchers._SubprocessScriptLauncher": {"training/lightning_private.py"},
    "torch._dynamo.exc": {"commands/error_handling.py"},
    "torch._ops": {"memory/torch_private.py"},
    "torch._subclasses.fake_tensor": {"memory/torch_private.py"},
    "torch.utils._python_dispatch": {"memory/torch_private.py"},
    "torch.utils._pytree": {"memory/torch_private.py"},
    "torchvision.models.detection._utils": {"models/heads/torchvision_private.py"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def modules_imported(path: Path, *, at_start: bool = False) -> Iterator[str]:
    """All imports of a file; those `at_start` run when it is imported."""
    tree = ast.parse(path.read_text())
    for node in tree.body if at_start else ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{one.name}" for one in node.names)
        elif isinstance(node, ast.Import):
            yield from (one.name for one in node.names)


def package_of(module: str) -> str:
    """The package of a module's dotted name below `e3va_cli`."""
    first, *rest = module.split(".")
    if first in SUBPACKAGES and rest and (PACKAGE / first / rest[0]).is_dir():
        return f"{first}.{rest[0]}"
    return first


def ours(path: Path) -> set[str]:
    names = {name.removeprefix("e3va_cli.") for name in modules_imported(path) if name.startswith("e3va_cli.")}
    return {package_of(name) for name in names if (PACKAGE / name.split(".")[0]).exists() or "." not in name}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_run_downwards(path):
    level = {package: number for number, packages in enumerate(LEVELS) for package in packages}
    own = package_of(name_of(path))
    for other in ours(path) & set(level) - {own}:
        assert level[other] < level[own], f"{own} imports {other}"
        assert {own, other} not in STRANGERS, f"{own} imports {other}"


def test_every_package_has_a_level():
    assert {package_of(name_of(path)) for path in FILES} - {"conf"} == set().union(*LEVELS)


def test_no_cycles():
    """Counts an import of a package as one of its `__init__.py`; a module of a package comes after that."""
    names = {name_of(path): path for path in FILES}
    graph = {}
    for name, path in names.items():
        wanted = set()
        for module in modules_imported(path, at_start=True):
            short = module.removeprefix("e3va_cli.")
            if module.startswith("e3va_cli.") and short in names:
                wanted.add(short)
            elif module.startswith("e3va_cli.") and f"{short}.__init__" in names:
                wanted.add(f"{short}.__init__")
        graph[name] = {one for one in wanted - {name} if not name.startswith(one.removesuffix("__init__"))}
    assert len(list(TopologicalSorter(graph).static_order())) == len(names)


def test_private_parts_of_other_packages_are_listed():
    found: dict[str, set[str]] = {}
    for path in FILES:
        for module in modules_imported(path):
            top = module.split(".")[0]
            private = [part for part in module.split(".") if part.startswith("_") and not part.startswith("__")]
            if private and top not in sys.stdlib_module_names and top != "e3va_cli":
                prefix = module[: module.index(private[0]) + len(private[0])]
                key = next((known for known in PRIVATE if module.startswith(known)), prefix)
                found.setdefault(key, set()).add(str(path.relative_to(PACKAGE)))
    assert found == PRIVATE


def test_nothing_outside_backbones_knows_a_family():
    for path in FILES:
        if "backbones" not in path.parts:
            code = "\n".join(line for line in path.read_text().splitlines() if "import" in line or "attn" in line)
            assert "swin" not in code.lower(), path
