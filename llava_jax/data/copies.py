"""Whole copies of files in buckets, in a cache on this machine.

    gs://bucket/train.json  is copied to  ~/.cache/llava_jax/buckets/gs/bucket/train.json

LLAVA_JAX_CACHE names another folder than the first four of these. A copy's time of modification is
made of its object's tag and not of a clock. Size and time thus say which version it is: to later
starts, which copy nothing twice, and to what is kept about a file, such as the index of a tar.
"""

import contextlib
import hashlib
import os
import shutil
import sys
from collections.abc import Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path

from tqdm import tqdm

from llava_jax.data.buckets import Object, Url, find, read
from llava_jax.errors import LlavaError, file_fault
from llava_jax.files import locked, whole_file

_THREADS = 8
_BLOCK = 32 << 20  # bytes of a request


def cache_folder() -> Path:
    """Where copies are."""
    if named := os.environ.get("LLAVA_JAX_CACHE"):
        return Path(named).expanduser()
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return caches / "llava_jax/buckets"


def copy_path(url) -> Path:
    """Where the copy of an object is, or of a folder's objects."""
    return cache_folder().joinpath(Url(url).scheme, *Url(url).parts[1:])


def local(places: Sequence[Path | Url]) -> list[Path]:
    """Files as paths on this machine: those of buckets are copied, unless they have been.

    Several processes may ask at once: one copies, the others wait.

    Raises:
      LlavaError: one cannot be read, or the disk is too small for all.
    """
    urls = [str(place) for place in places if isinstance(place, Url)]
    with ThreadPool(_THREADS) as pool:
        found = dict(zip(urls, pool.map(find, urls), strict=True))
        if missing := [url for url, item in found.items() if item is None]:
            raise LlavaError(f"there is no {missing[0]}")
        _copy_all(list(found.values()), pool)
    return [copy_path(place) if isinstance(place, Url) else place for place in places]


def local_set(folder: Path | Url) -> Path:
    """The folder of a TFDS data set, or of a bucket's the copy of its version folder.

    Raises:
      LlavaError: as `local`.
    """
    if isinstance(folder, Path):
        return folder
    files = folder.files(2)
    homes = {file.parent for file in files if file.name == "dataset_info.json"}
    if len(homes) != 1:
        found = f"several data sets; name one: {', '.join(sorted(map(str, homes)))}"
        raise LlavaError(
            f"{folder} holds "
            + (found if homes else "no data set: no Parquet files, tars or dataset_info.json")
        )
    (home,) = homes
    local([file for file in files if file.parent == home])
    return copy_path(home)


def _copy_all(objects: list[Object], pool: ThreadPool) -> None:
    if all(map(_is_copied, objects)):
        return
    try:
        with contextlib.ExitStack() as stack:
            for folder in sorted({copy_path(item.url).parent for item in objects}):
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(folder, None))
            missing = [item for item in objects if not _is_copied(item)]
            _report(missing)
            with tqdm(
                desc="copying", total=sum(item.size for item in missing),
                unit="B", unit_scale=True, disable=not missing,
            ) as bar:  # fmt: skip
                for _ in pool.imap_unordered(lambda item: _copy(item, bar), missing):
                    pass
    except OSError as error:
        raise LlavaError(f"{file_fault(error)}; LLAVA_JAX_CACHE names another folder") from None


def _report(missing: list[Object]) -> None:
    """Says what will come; LlavaError if there is no room for it."""
    if not missing:
        return
    size, folder = sum(item.size for item in missing), cache_folder()
    for item in missing:
        if copy_path(item.url).exists() and item.tag:
            tqdm.write(f"{item.url} is not what it was when it was copied", file=sys.stderr)
    free = shutil.disk_usage(folder).free
    if size > free:
        raise LlavaError(
            f"{len(missing)} files with {size / 1e9:,.1f} GB, {missing[0].url} and others, do not "
            f"fit into {folder}, where {free / 1e9:,.1f} GB are free: make room, or name a folder "
            "on a larger disk with LLAVA_JAX_CACHE"
        )
    more = f" and {len(missing) - 1} more files" if len(missing) > 1 else ""
    text = f"copying {missing[0].url}{more}, {size / 1e6:,.1f} MB, to {folder}"
    tqdm.write(text, file=sys.stderr)


def _is_copied(item: Object) -> bool:
    try:
        status = os.stat(copy_path(item.url))
    except OSError:
        return False
    is_same = (status.st_size, status.st_mtime) == (item.size, _time_of(item.tag))
    return is_same and bool(item.tag)


def _time_of(tag: str) -> int:
    """Seconds that stand for a tag: 31 bits of its hash, which every file system can keep."""
    return int.from_bytes(hashlib.sha256(tag.encode()).digest()[:4]) >> 1


def _copy(item: Object, bar: tqdm) -> None:
    path = copy_path(item.url)
    for left in path.parent.glob("*.partial"):  # of a killed process: the folder is locked
        if left.name.startswith(f"{path.name}.") and f".{os.getpid()}." not in left.name:
            left.unlink(missing_ok=True)
    with whole_file(path) as file:
        for start in range(0, item.size, _BLOCK):
            size = min(_BLOCK, item.size - start)
            # Not every web server gives parts.
            file.write(read(item.url, size, None if size == item.size else start))
            bar.update(size)
        if find(item.url, anew=True) != item:
            raise LlavaError(f"{item.url} was changed while it was copied: start again")
        file.flush()
        os.utime(file.fileno(), (_time_of(item.tag),) * 2)
