"""`checksums.json`: the SHA-256 of every file of a folder, written last and checked first."""

import functools
import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import jax

from llava_jax.errors import LlavaError

CHECKSUMS_FILE = "checksums.json"
_SETTLED = 2_000_000_000  # nanoseconds; two writes can be closer than the resolution of file times


def write_checksums(folder: Path, known: Mapping[str, str] | None = None) -> None:
    """Writes the SHA-256 of every file under `folder` to its `checksums.json`.

    `known` gives digests, by name in the folder, of files that need not be read again.
    """
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != CHECKSUMS_FILE)
    names = [p.relative_to(folder).as_posix() for p in files]
    digests = {name: (known or {}).get(name) or sha256(folder / name) for name in names}
    (folder / CHECKSUMS_FILE).write_text(json.dumps(digests, indent=2) + "\n")


def verify_checksums(folder: Path) -> frozenset[str] | None:
    """Compares every file named in `checksums.json` with its bytes.

    With several processes, each verifies its share of the files.

    Returns:
      The names of the files covered, or None if the folder has no checksums.
    Raises:
      LlavaError: a file is missing or its bytes changed, or the list itself is damaged.
    """
    listing = folder / CHECKSUMS_FILE
    if not listing.exists():
        return None
    digests = read_checksums(folder)
    for name in digests:
        if not (folder / name).is_file():
            raise LlavaError(
                f"{folder / name} is missing, although {listing} lists it: make {folder} anew"
            )
    for name in _part_of_this_process(sorted(digests)):
        if sha256(folder / name) != digests[name]:
            raise LlavaError(
                f"{folder / name} has changed since it was written (its SHA-256 is not the one in "
                f"{listing}): make {folder} anew"
            )
    return frozenset(digests)


def _part_of_this_process(names: list[str]) -> list[str]:
    if not jax.distributed.is_initialized():
        return names
    return names[jax.process_index() :: jax.process_count()]


def is_whole(folder: Path, log: Callable[[str], None] = print) -> bool:
    """True for a folder with checksums that all match; `log` receives the first that does not."""
    if not (folder / CHECKSUMS_FILE).exists():
        return False
    try:
        verify_checksums(folder)
    except LlavaError as error:
        log(str(error))
        return False
    return True


def read_checksums(folder: Path) -> dict[str, str]:
    """File -> SHA-256 from `checksums.json`, without reading the files; LlavaError if damaged."""
    listing = folder / CHECKSUMS_FILE
    try:
        digests = json.loads(listing.read_text())
        sound = isinstance(digests, dict) and all(
            re.fullmatch("[0-9a-f]{64}", d) and inside_folder(n) for n, d in digests.items()
        )
    except (ValueError, TypeError, RecursionError):
        sound = False
    if not sound:
        raise LlavaError(f"{listing} is damaged: it must map file names to SHA-256 digests")
    return digests


def inside_folder(name: object) -> bool:
    """True for a plain relative path that cannot leave the folder it is joined to."""
    if not isinstance(name, str) or not name or "\\" in name or "\0" in name:
        return False
    return not name.startswith("/") and ".." not in name.split("/")


def sha256(path: Path) -> str:
    """Digest of a file's bytes; a file that has not changed for a while is read once a process."""
    status = path.stat()
    if time.time_ns() - status.st_mtime_ns < _SETTLED:
        return _digest(path)
    return _known_digest(path.resolve(), status.st_size, status.st_mtime_ns, status.st_ino)


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.lru_cache
def _known_digest(path: Path, size: int, mtime: int, inode: int) -> str:
    return _digest(path)
