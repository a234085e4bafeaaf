"""Pictures and videos inside a larger file or in a bucket, which are read when they are needed."""

import functools
import os
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Hashable
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
        """So many of its bytes.

        Raises:
          OSError, ValueError: they cannot be read, or there are fewer.
          LlavaError: the file is gone or was changed.
        """
        if start < 0 or not 0 <= count <= self.size - start:
            raise ValueError(f"the file ends at byte {self.size:,}")
        # Held until it is read: what falls out of the cache is closed, and its number used again.
        opened = _opened(self)
        data = os.pread(opened.fileno(), count, start)
        if len(data) < count:
            raise ValueError(f"the file ends at byte {start + len(data):,}")
        return data


@functools.lru_cache(maxsize=64)
def _opened(file: File) -> BinaryIO:
    opened = open(file.path, "rb", buffering=0)
    if File.of(file.path) != file:
        raise LlavaError(f"{file.path} was changed after it was opened first: start again")
    return opened


class Recent:
    """What was read last, at most so many bytes of it; threads may share it."""

    def __init__(self, most: int):
        self._most, self._size, self._lock = most, 0, threading.Lock()
        self._kept: OrderedDict[Hashable, tuple[object, int]] = OrderedDict()

    def get(self, key: Hashable):
        """The value kept for a key, None if there is none."""
        with self._lock:
            if key not in self._kept:
                return None
            self._kept.move_to_end(key)
            return self._kept[key][0]

    def keep(self, key: Hashable, value, size: int) -> None:
        """Keeps a value of so many bytes, and forgets those that were used the longest ago."""
        with self._lock:
            self._size += size - self._kept.pop(key, (None, 0))[1]
            self._kept[key] = value, size
            while self._size > self._most:
                self._size -= self._kept.popitem(last=False)[1][1]

    def clear(self) -> None:
        with self._lock:
            self._kept.clear()
            self._size = 0


class Stored(ABC):
    """The encoded bytes of a file that is not one of this machine's own; small until it is read.

    Picklable.
    """

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

    def check(self, kind: str, where: str) -> None:
        """RecordError unless it is there, of what may be missing; kind: image or video."""
        del kind, where

    def state(self) -> bytes:
        """Changes with its content; empty for what changes only with the file around it."""
        return b""
