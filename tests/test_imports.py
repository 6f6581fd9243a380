"""Imports run downwards only: commands, then training, then heads, adapters, data and metrics, then backbones."""

import ast
from pathlib import Path

import pytest

import e3va_cli

PACKAGE = Path(e3va_cli.__file__).parent
LEVELS = {
    "cli": 6,
    "api": 6,
    "commands": 5,
    "hydra_app": 5,
    "sweep": 5,
    "training": 4,
    "memory": 4,
    "export": 4,
    "model": 3,
    "metrics": 2.5,
    "heads": 2,
    "adapters": 2,
    "data": 2,
    "backbones": 1,
    "composition": 2.7,
    "quoting": 2.7,
    "run_config": 2.6,
    "optim": 2,
    "run_folder": 0.5,
    "run_lock": 0.5,
    "autocast": 0,
    "config": 0,
    "files": 0,
    "fonts": 0,
    "machine": 0,
    "command_line": -1,
    "terminal": -1,
    "output": -1,
    "text": -1,
    "errors": -1,
}
SIBLINGS_THAT_MUST_NOT_MEET = [{"heads", "adapters"}, {"heads", "data"}, {"adapters", "data"}]


def room(module: str) -> str:
    return module.split(".")[1]


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("e3va_cli."):
            names.add(room(node.module))
    return names


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_downwards(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    own = parts[0]
    if own in ("__init__", "__main__"):
        return
    for other in imported(path) - {own}:
        assert LEVELS[other] <= LEVELS[own], f"{own} imports {other}"
        assert {own, other} not in SIBLINGS_THAT_MUST_NOT_MEET, f"{own} imports {other}"


def test_nothing_outside_backbones_knows_swin():
    for path in PACKAGE.rglob("*.py"):
        if "backbones" not in path.parts:
            code = "\n".join(line for line in path.read_text().splitlines() if "import" in line or "attn" in line)
            assert "swin" not in code.lower(), path
