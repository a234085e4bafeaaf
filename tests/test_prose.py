"""README, the pages of docs/ and the words of the code: `make lint` runs this file."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "findings/README.md", *sorted((ROOT / "docs").rglob("*.md"))]
CODE = [ROOT / "train.py", ROOT / "eval.py", ROOT / "setup.py"]
CODE += sorted(p for f in ("llava_jax", "configs", "bench") for p in (ROOT / f).rglob("*.py"))
# told -> reported, logged; beside -> next to, besides; lie -> be stored; of theirs -> their
DIALECT = re.compile(
    r"\b([Tt]old|[Bb]eside|[Ll]ies?|of (theirs|others)|[Nn]one as above|commonest)\b"
)
README = PAGES[0].read_text(encoding="utf-8")
LINK = re.compile(r"\]\(([^)\s]+)\)")


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def prose(page: Path) -> list[tuple[int, str]]:
    """The numbered lines of a page that are neither code nor part of a table."""
    lines, fenced = [], False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        fence = line.lstrip().startswith("```")
        if not (fence or fenced or line.startswith("|")):
            lines.append((number, line))
        fenced ^= fence
    return lines


def anchors(page: Path) -> set[str]:
    """The names that GitHub and the site give to the headings of a page."""
    headings = (line.lstrip("#").strip() for _, line in prose(page) if line.startswith("#"))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_prose_is_wrapped_at_100_columns(page):
    assert not [number for number, line in prose(page) if len(LINK.sub("]()", line)) > 100]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_a_file_and_a_heading(page):
    for link in LINK.findall("\n".join(line for _, line in prose(page))):
        if not re.match(r"[a-z]+:", link):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_readme_counts_lines_to_a_tenth():
    rows = re.findall(r"^\| \[[^|]*\]\(([^)]+\.py)\) \| ([\d,]+) \|$", README, re.M)
    assert rows
    for path, said in rows:
        lines = len((ROOT / path).read_text(encoding="utf-8").splitlines())
        assert abs(int(said.replace(",", "")) - lines) <= max(lines / 10, 5), f"{path}: {lines}"


def end_of(node: ast.expr) -> str:
    """The literal text that an expression ends with, "" if it ends with a value."""
    if isinstance(node, ast.JoinedStr):
        node = node.values[-1]
    elif isinstance(node, ast.BinOp):
        return end_of(node.right)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def messages(path: Path) -> list[tuple[int, str]]:
    """(line, end of the message) of each error that a file makes."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    calls = [node for node in nodes if isinstance(node, ast.Call) and node.args]
    errors = [call for call in calls if getattr(call.func, "id", "").endswith("Error")]
    return [(call.lineno, end_of(call.args[-1])) for call in errors]


@pytest.mark.parametrize("path", CODE, ids=name)
def test_error_messages_end_without_a_full_stop(path):
    assert not [line for line, text in messages(path) if text.rstrip().endswith(".")]


def test_the_messages_are_found():
    assert sum(len(messages(path)) for path in CODE) > 200


@pytest.mark.parametrize("path", [*CODE, *PAGES], ids=name)
def test_words_are_those_of_a_native_author(path):
    lines = enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
    assert not [f"{number}: {line.strip()}" for number, line in lines if DIALECT.search(line)]
