"""What lies where on the device: pictures in the feature store, prompts in the cache's rows."""

from collections import OrderedDict
from collections.abc import Collection

import numpy as np


class ImageSlots:
    """Slots of the feature store by content, the least recently used given away first.

    Each picture also has a number that no other content ever gets, so that prompts can be compared
    as rows of numbers.
    """

    def __init__(self, count: int):
        self._free = list(range(count))
        self._held: OrderedDict[bytes, tuple[int, int]] = OrderedDict()  # digest -> slot, number
        self._numbers = 0

    def find(self, digest: bytes) -> tuple[int, int] | None:
        """(slot, number) of a picture that is in the store, now the most recently used."""
        if digest not in self._held:
            return None
        self._held.move_to_end(digest)
        return self._held[digest]

    def add(self, digest: bytes, pinned: Collection[int]) -> tuple[int, int] | None:
        """(slot, number) for a new picture; None where every slot is one of `pinned`."""
        if not self._free:
            oldest = next((d for d, (slot, _) in self._held.items() if slot not in pinned), None)
            if oldest is None:
                return None
            self._free.append(self._held.pop(oldest)[0])
        self._numbers += 1
        self._held[digest] = self._free.pop(), self._numbers
        return self._held[digest]


class RowSlots:
    """What the rows of the cache hold, and since when each is unused.

    A prompt is known by its `contents`, int64[T]: token ids, and for the tokens of a picture its
    number below zero. Equal contents at the start of two prompts mean equal keys and values there.
    """

    def __init__(self, count: int):
        self.count = count
        self.contents = [np.zeros(0, np.int64)] * count
        self._used = [0] * count
        self._clock = 0

    def donor(self, contents: np.ndarray, excluded: Collection[int]) -> tuple[int, int]:
        """(row, tokens) of the row that begins most like a prompt, less the prompt's last token.

        One token is always read: its hidden state chooses the answer's first.
        """
        shared = [
            0 if row in excluded else common_prefix(held, contents[:-1])
            for row, held in enumerate(self.contents)
        ]
        row = int(np.argmax(shared))
        self.touch(row)
        return row, shared[row]

    def put(self, row: int, contents: np.ndarray) -> None:
        self.contents[row] = contents
        self.touch(row)

    def touch(self, row: int) -> None:
        """Makes a row the most recently used."""
        self._clock += 1
        self._used[row] = self._clock

    def oldest(self, rows: Collection[int]) -> int:
        """The least recently used of `rows`."""
        return min(rows, key=self._used.__getitem__)


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """How many numbers two arrays have in common at their start."""
    length = min(len(a), len(b))
    different = a[:length] != b[:length]
    return int(different.argmax()) if different.any() else length
