"""Every error message for users stands in `error_messages.txt`. Update it: `python tests/test_error_messages.py`."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "src" / "e3va_cli"
PASSED_ON = re.compile(r"\*?\{[^{}]*(\{[^{}]*\}[^{}]*)*\}")  # made elsewhere
LISTED = Path(__file__).with_name("error_messages.txt")


def text_of(node: ast.expr) -> str:
    """Return a message as it is written, with what is filled in as {expression}."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return text_of(node.value) if isinstance(node.value, ast.Constant) else f"{{{ast.unparse(node.value)}}}"
    if isinstance(node, ast.Starred):
        return f"*{text_of(node.value)}"
    return f"{{{ast.unparse(node)}}}"


def is_error_class(node: ast.expr) -> bool:
    name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
    return name in ("UserError", "UnwritableError")


def adds_error(node: ast.expr) -> bool:
    """Whether this is the `append` of a list of errors."""
    return (
        isinstance(node, ast.Attribute)
        and node.attr == "append"
        and isinstance(node.value, ast.Name)
        and node.value.id in ("errors", "mistakes")
    )


def messages_in(tree: ast.Module) -> Iterator[str]:
    """Yield the arguments of each `UserError(...)`, what is added to lists of errors, and what `errors` yields."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (is_error_class(node.func) or adds_error(node.func)):
            yield from map(text_of, node.args)
        elif isinstance(node, ast.FunctionDef) and node.name.endswith("errors"):
            yield from (text_of(one.value) for one in ast.walk(node) if isinstance(one, ast.Yield) and one.value)


def all_messages() -> str:
    """Return the messages of each module, sorted."""
    blocks = []
    for path in sorted(PACKAGE.rglob("*.py")):
        found = set(messages_in(ast.parse(path.read_text(encoding="utf-8"))))
        if messages := sorted(message for message in found if not PASSED_ON.fullmatch(message)):
            blocks.append("\n".join([str(path.relative_to(PACKAGE)), *(f"    {message}" for message in messages)]))
    return "\n\n".join(blocks) + "\n"


def test_error_messages_are_listed() -> None:
    assert LISTED.read_text(encoding="utf-8") == all_messages(), "run `python tests/test_error_messages.py`, and read"


if __name__ == "__main__":
    LISTED.write_text(all_messages(), encoding="utf-8")
