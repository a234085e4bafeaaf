"""README, the pages of docs/ and the words of the code: `make lint` runs this file."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
UNWRAPPED = (
    "docs/extend/",
    "docs/use/ask",
    "docs/use/weights",
)
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


@pytest.mark.parametrize("page", [p for p in PAGES if not name(p).startswith(UNWRAPPED)], ids=name)
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
