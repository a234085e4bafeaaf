"""Pictures and videos inside a larger file, which are read when they are needed."""

import functools
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import BinaryIO, NamedTuple

from llava_jax.errors import LlavaError


class File(NamedTuple):
    """A file as it was when it was opened first, by its size and time of modification."""

    path: Path
    size: int
    modified: int

    @classmethod
    def of(cls, path: Path) -> "File":
        """The file as it is now; LlavaError if there is none."""
        try:
            status = os.stat(path)
        except OSError as error:
            raise LlavaError(f"cannot read {path}: {error.strerror}") from None
        return cls(path, status.st_size, status.st_mtime_ns)

    def read(self, start: int, count: int) -> bytes:
        """So many of its bytes; OSError, or ValueError if it has changed or has fewer."""
        data = os.pread(_opened(self).fileno(), count, start)
        if len(data) < count:
            raise ValueError(f"the file ends at byte {start + len(data):,}")
        return data


@functools.lru_cache(maxsize=64)
def _opened(file: File) -> BinaryIO:
    opened = open(file.path, "rb", buffering=0)
    if File.of(file.path) != file:
        raise ValueError("the file was changed after it was opened first")
    return opened


class Stored(ABC):
    """The encoded bytes of a file within a file; picklable, and small until it is read."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What messages call it."""

    @abstractmethod
    def read(self) -> bytes:
        """The encoded bytes.

        Raises:
          LlavaError: the file around it cannot be read, or is damaged there.
        """


def loaded(source):
    """A source with its bytes in place of where they are stored; any other source as it is."""
    return source.read() if isinstance(source, Stored) else source
