"""The quickstart's folders: written once, and again after the code that writes them has changed."""

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

from llava_jax.weights.checksums import is_whole
from llava_jax.weights.write.save import whole_folder

CODE_FILE = "code.sha256"  # in the folder: the digest of the source files that wrote it


def is_written(folder: Path, sources: list[str], log: Callable[[str], None]) -> bool:
    """True for a folder that `sources` wrote as they are now, and that has not changed since."""
    if not is_whole(folder, log):
        return False
    mark = folder / CODE_FILE
    if not mark.exists() or mark.read_text() != _digest(sources):
        log(f"{folder} was written by another version of this program")
        return False
    log(f"{folder} is there and unchanged")
    return True


@contextlib.contextmanager
def written_folder(folder: Path, sources: list[str]) -> Iterator[Path]:
    """`whole_folder`, marked as written by `sources`, the paths of Python files."""
    with whole_folder(folder) as temporary:
        yield temporary
        (temporary / CODE_FILE).write_text(_digest(sources))


def _digest(sources: list[str]) -> str:
    return hashlib.sha256(b"".join(Path(source).read_bytes() for source in sources)).hexdigest()
