"""What lies where on the device: pictures in the feature store, prompts in the cache's rows."""

from collections import OrderedDict
from collections.abc import Collection

import numpy as np

NOTHING = np.iinfo(np.int64).min  # in no prompt's contents


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

    def __init__(self, count: int, size: int):
        self.count = count
        self._contents = np.full((count, size), NOTHING, np.int64)
        self._used = [0] * count
        self._clock = 0

    def donor(self, contents: np.ndarray, planned: dict[int, np.ndarray]) -> tuple[int, int]:
        """(row, tokens) of the row that begins most like a prompt, less the prompt's last token.

        One token is always read: its hidden state chooses the answer's first.

        Args:
          planned: by row, contents that will replace what it holds.
        """
        wanted = contents[:-1]
        shared = common_prefixes(self._contents[:, : len(wanted)], wanted)
        for row, other in planned.items():
            shared[row] = common_prefixes(other[None, : len(wanted)], wanted)[0]
        row = int(np.argmax(shared))
        self.touch(row)
        return row, int(shared[row])

    def put(self, row: int, contents: np.ndarray) -> None:
        self._contents[row] = NOTHING
        self._contents[row, : len(contents)] = contents
        self.touch(row)

    def touch(self, row: int) -> None:
        """Makes a row the most recently used."""
        self._clock += 1
        self._used[row] = self._clock

    def oldest(self, rows: Collection[int]) -> int:
        """The least recently used of `rows`."""
        return min(rows, key=self._used.__getitem__)


def common_prefixes(rows: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """int[n]: how many numbers rows [n, at most T] have in common with [T] at their start."""
    different = rows != wanted[: rows.shape[1]]
    if not different.shape[1]:
        return np.zeros(len(rows), int)
    return np.where(different.any(axis=1), different.argmax(axis=1), different.shape[1])
