"""Hooks of mkdocs.yml: README as the home page, the API reference, the files that pages link to.

Pages link to files of the repository by relative paths, which is what GitHub follows. Here a link
that leaves docs/ is turned to a page of the site:

    README.md              -> index.md
    findings/README.md     -> findings/README.md, as it is
    llava_jax/models       -> reference/models.md, the docstrings of that package
    configs/base.py        -> source/configs/base.py.md, the file itself
"""

import os
import re
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, InclusionLevel

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "llava_jax"
OUTSIDE = (ROOT / "README.md", ROOT / "findings" / "README.md")  # pages that are not in docs/
LINK = re.compile(r"\]\((?![a-z]+:|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files, config):
    def add(uri: str, content: str, **options) -> None:
        files.append(File.generated(config, uri, content=content, **options))

    for package in packages():
        add(f"reference/{package}.md", reference(package))
    pages = [*OUTSIDE, *(ROOT / "docs").rglob("*.md")]
    texts = {page: page.read_text(encoding="utf-8") for page in pages}
    for page in OUTSIDE:
        add(site_uri(page), texts[page])
    linked = {linked_path(page, link[1]) for page in pages for link in LINK.finditer(texts[page])}
    for path in sorted(path for path in linked if site_uri(path).startswith("source/")):
        text = path.read_text(encoding="utf-8")
        content = f"# {path.name}\n\n```{path.suffix[1:]}\n{text}\n```\n"
        add(site_uri(path), content, inclusion=InclusionLevel.NOT_IN_NAV)
    return files


def on_page_markdown(markdown, page, config, files):
    uri = page.file.src_uri
    sources = {site_uri(path): path for path in OUTSIDE}
    source = sources.get(uri, ROOT / "docs" / uri)
    if not source.exists():  # made above
        return markdown

    def to_site(link: re.Match) -> str:
        target = site_uri(linked_path(source, link[1]))
        return f"]({os.path.relpath(target, os.path.dirname(uri) or '.')}{link[2] or ''})"

    return LINK.sub(to_site, markdown)


def packages() -> list[str]:
    return sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))


def reference(package: str) -> str:
    """A page that mkdocstrings fills with the docstrings of a package, module by module."""
    modules = sorted((PACKAGE / package).rglob("*.py"))
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in modules]
    names = [name for name in names if not name.endswith(("__init__", "__main__"))]
    return f"# llava_jax.{package}\n\n" + "\n".join(f"::: {name}\n" for name in names)


def linked_path(page: Path, link: str) -> Path:
    path = Path(os.path.normpath(page.parent / link))
    if not path.exists() or ROOT not in path.parents:
        raise PluginError(f"{page.relative_to(ROOT)} links to {link}, which does not exist")
    return path


def site_uri(path: Path) -> str:
    """The path in the site of a file or folder of the repository."""
    relative = path.relative_to(ROOT)
    if relative == Path("README.md"):
        return "index.md"
    if path in OUTSIDE:
        return relative.as_posix()
    if relative.parts[0] == "docs":
        return relative.relative_to("docs").as_posix()
    if path.is_file():
        return f"source/{relative.as_posix()}.md"
    if path.parent == PACKAGE:
        return f"reference/{path.name}.md"
    raise PluginError(f"a page links to the folder {relative}: link to one of its files")
