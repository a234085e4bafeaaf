"""Pictures and videos inside a larger file, which are read when they are needed."""

import os
from abc import ABC, abstractmethod


class Stored(ABC):
    """The encoded bytes of a file within a file; picklable, and small until it is read.

    Attributes:
      path: of the file around it.
    """

    path: str | os.PathLike

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
