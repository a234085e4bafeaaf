"""Output files: locked while they are written, replaced whole, and marked with the run they are of.

A program may be killed, or a machine lose power, at any moment, and two programs may be started on
the same output. None of that leaves a file that looks complete and is not.
"""

import contextlib
import errno
import fcntl
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from llava_jax.errors import LlavaError

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF)


def lock(file: BinaryIO | int, path: Path, busy: str | None) -> None:
    """Locks an open file or folder until it is closed, at the latest by the end of the process.

    A file system without locks, such as Lustre mounted without flock, is reported; the program goes
    on without one.

    Args:
      file: a file object or a descriptor.
      path: its name, for messages.
      busy: the error message if another process holds the lock; None: wait for it.

    Raises:
      LlavaError: another process holds it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if busy is None else fcntl.LOCK_NB))
    except BlockingIOError:
        raise LlavaError(busy) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        print(
            f"the file system of {path} has no locks ({error.strerror}): start no second program "
            "that writes there",
            file=sys.stderr,
        )


@contextlib.contextmanager
def locked(path: Path, busy: str | None) -> Iterator[int]:
    """Holds the lock on a folder, or on a file, which is made if it is not there.

    Yields:
      The open descriptor.

    Raises:
      LlavaError: another process holds the lock; `busy` is the message. With None it waits.
    """
    kind = os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT
    descriptor = os.open(path, kind, 0o666)
    try:
        lock(descriptor, path, busy)
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Opens a file that takes the place of `path` in one step if the block ends without an error.

    Until then `path` keeps its old content. What a killed process has left is a file of another
    name, `NAME.HOST.PID.partial`.
    """
    partial = path.with_name(f"{path.name}.{os.uname().nodename}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: dict | list) -> None:
    """Writes a JSON file in UTF-8, whole or not at all."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    with whole_file(path) as file:
        file.write(_utf8(text))


def write_records(path: Path, records: Sequence[dict]) -> None:
    """Writes a record a line, whole or not at all: lines of a .jsonl file, else one JSON list."""
    with whole_file(path) as file:
        if path.suffix == ".jsonl":
            file.writelines(map(json_line, records))
            return
        file.write(b"[")
        for i, record in enumerate(records):
            file.write((b",\n" if i else b"\n") + json_line(record).rstrip(b"\n"))
        file.write(b"\n]\n")


def json_line(value: dict) -> bytes:
    """One line of a .jsonl file, in UTF-8."""
    return _utf8(json.dumps(value, ensure_ascii=False) + "\n")


def _utf8(text: str) -> bytes:
    """JSON text as bytes.

    Half a character (a lone surrogate) has no bytes in UTF-8. Model output and names of files may
    hold one; it becomes an escape, from which JSON reads the same text.
    """
    return text.encode("utf-8", "backslashreplace")


def claim(mark: Path, run: dict, output: Path) -> None:
    """Marks an output as the result of `run`, unless it holds results of another run.

    To be called under a lock on the output; arguments and errors as in `check_claim`.
    """
    check_claim(mark, run, output)
    write_json(mark, run)


def check_claim(mark: Path, run: dict, output: Path) -> None:
    """Compares the run that an output is of with `run`.

    Args:
      mark: the JSON file that says which run the output is of.
      run: what the results depend on, as JSON values.
      output: the file of results; one that is missing or empty is nobody's.

    Raises:
      LlavaError: the results are of another run; the message names the keys that differ.
    """
    if not output.exists() or not output.stat().st_size:
        return
    other = {}
    with contextlib.suppress(OSError, ValueError):
        other = json.loads(mark.read_text(encoding="utf-8"))
    other = other if isinstance(other, dict) else {}
    if changed := [key for key in run if other.get(key) != run[key]]:
        raise LlavaError(
            f"{output} holds answers of another run (different: {', '.join(changed)}): give "
            "another --output, or --overwrite to ask again"
        )
