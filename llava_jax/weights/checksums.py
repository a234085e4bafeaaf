"""`checksums.json`: the SHA-256 of every file of a folder, written last and checked first."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from llava_jax.errors import LlavaError

CHECKSUMS_FILE = "checksums.json"


def write_checksums(folder: Path, known: Mapping[str, str] | None = None) -> None:
    """Writes the SHA-256 of every file under `folder` to its `checksums.json`.

    `known` gives those of files that need not be read again, by their name in the folder.
    """
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != CHECKSUMS_FILE)
    names = [p.relative_to(folder).as_posix() for p in files]
    digests = {name: (known or {}).get(name) or _sha256(folder / name) for name in names}
    (folder / CHECKSUMS_FILE).write_text(json.dumps(digests, indent=2) + "\n")


def verify_checksums(folder: Path) -> frozenset[str] | None:
    """Compares every file named in `checksums.json` with its bytes.

    Returns:
      The names of the files covered, or None when the folder carries no checksums.
    Raises:
      LlavaError: a file is missing or its bytes changed, or the list itself is damaged.
    """
    listing = folder / CHECKSUMS_FILE
    if not listing.exists():
        return None
    for name, expected in _read_listing(listing).items():
        path = folder / name
        if not path.is_file():
            raise LlavaError(f"{path} is missing, although {listing} lists it: make {folder} anew.")
        if _sha256(path) != expected:
            raise LlavaError(
                f"{path} has changed since it was written (its SHA-256 is not the one in "
                f"{listing}): make {folder} anew."
            )
    return frozenset(_read_listing(listing))


def is_whole(folder: Path, log: Callable[[str], None] = print) -> bool:
    """True for a folder with checksums that all hold; `log` is told which file changed."""
    if not (folder / CHECKSUMS_FILE).exists():
        return False
    try:
        verify_checksums(folder)
    except LlavaError as error:
        log(str(error))
        return False
    return True


def _read_listing(listing: Path) -> dict[str, str]:
    try:
        digests = json.loads(listing.read_text())
        sound = isinstance(digests, dict) and all(
            re.fullmatch("[0-9a-f]{64}", d) and inside_folder(n) for n, d in digests.items()
        )
    except (UnicodeDecodeError, json.JSONDecodeError, TypeError):
        sound = False
    if not sound:
        raise LlavaError(f"{listing} is damaged: it must map file names to SHA-256 digests.")
    return digests


def inside_folder(name: object) -> bool:
    """True for a plain relative path that cannot leave the folder it is joined to."""
    if not isinstance(name, str) or not name or "\\" in name or "\0" in name:
        return False
    return not name.startswith("/") and ".." not in name.split("/")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
