"""Error messages have one style: a sentence without a full stop."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = [*(ROOT / "llava_jax").rglob("*.py"), ROOT / "train.py", ROOT / "eval.py"]


def end_of(node: ast.expr) -> str:
    """The literal text that an expression ends with, "" if it ends with a value."""
    if isinstance(node, ast.JoinedStr):
        node = node.values[-1]
    elif isinstance(node, ast.BinOp):
        return end_of(node.right)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def messages(path: Path) -> list[tuple[int, str]]:
    """(line, end of the message) of each error that is made in a file."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    calls = [node for node in nodes if isinstance(node, ast.Call) and node.args]
    errors = [call for call in calls if getattr(call.func, "id", "").endswith("Error")]
    return [(call.lineno, end_of(call.args[-1])) for call in errors]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_message_ends_with_a_full_stop(path):
    assert [line for line, text in messages(path) if text.endswith(".")] == []


def test_the_messages_are_found():
    assert sum(len(messages(path)) for path in FILES) > 200
