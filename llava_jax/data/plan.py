"""Which conversations share a row: a pure function of their lengths and a seed."""

import bisect
import threading
from dataclasses import dataclass

import numpy as np

from llava_jax.data.rows import RowFormat

POOL = 2048  # records that are packed together; larger pools fill rows no better
_MANY = 1 << 20  # more than the records of a pool


@dataclass(frozen=True)
class PackPlan:
    """Rows as lists of record numbers: row r holds members[offsets[r] : offsets[r + 1]]."""

    offsets: np.ndarray
    members: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.members[self.offsets[row] : self.offsets[row + 1]]


def plan_rows(
    lengths: np.ndarray,
    tiles: np.ndarray,
    row_length: int,
    tiles_per_row: int,
    seed: int,
    epoch: int,
    packing: bool = True,
    pool: int = POOL,
) -> PackPlan:
    """One epoch's rows: every record once, in an order that (seed, epoch) decides.

    Args:
      lengths, tiles: int [N], tokens and tiles of each record; each must fit in a row alone.
      packing: if not, each record has a row of its own.
      pool: records of the shuffled order that are packed together.

    With `packing`, best-fit decreasing in pools of the shuffled order, under both budgets: from the
    longest to the shortest, each record of a pool goes to the fullest row that it fits. Without,
    one record a row.
    """
    lengths, tiles = np.asarray(lengths), np.asarray(tiles)
    if len(lengths) and (lengths.max() > row_length or tiles.max() > tiles_per_row):
        raise ValueError("a record is larger than a row")
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch])))
    order = generator.permutation(len(lengths)).astype(np.int32)
    if not packing:
        return PackPlan(np.arange(len(order) + 1), order)
    members, sizes = [], []
    for start in range(0, len(order), pool):
        some = order[start : start + pool]
        some = some[np.argsort(-lengths[some], kind="stable")]  # the longest first
        rows = _best_fit(lengths[some].tolist(), tiles[some].tolist(), row_length, tiles_per_row)
        members.append(some[np.argsort(rows, kind="stable")])
        sizes.append(np.bincount(rows))
    members, sizes = (np.concatenate([np.zeros(0, np.int32), *part]) for part in (members, sizes))
    # A pool's last rows are the emptiest: spread them over the epoch.
    spread = generator.permutation(len(sizes))
    first, sizes = (np.cumsum(sizes) - sizes)[spread], sizes[spread]
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    places = np.repeat(first - offsets[:-1], sizes) + np.arange(len(members))
    return PackPlan(offsets, members[places])


def _best_fit(
    lengths: list[int], tiles: list[int], row_length: int, tiles_per_row: int
) -> list[int]:
    """The row of each record of a pool, which come one after the other.

    Of rows that are equally full the first is taken.
    """
    # The rows with so many free tiles, ascending: free tokens * _MANY + number of the row.
    free: list[list[int]] = [[] for _ in range(tiles_per_row + 1)]
    rows, count = [], 0
    for tokens, needed in zip(lengths, tiles, strict=True):
        least, best = tokens * _MANY, None
        for left in range(needed, tiles_per_row + 1):
            place = bisect.bisect_left(free[left], least)
            if place < len(free[left]) and (best is None or free[left][place] < best[0]):
                best = free[left][place], left, place
        if best is None:
            key, left, count = row_length * _MANY + count, tiles_per_row, count + 1
        else:
            key, left, place = best
            del free[left][place]
        rows.append(key % _MANY)
        bisect.insort(free[left - needed], key - least)
    return rows


class RowStream:
    """All epochs' rows, one after the other, addressed by number; picklable and thread-safe."""

    def __init__(self, lengths: np.ndarray, tiles: np.ndarray, row_format: RowFormat, seed: int):
        self._arguments = lengths, tiles, row_format, seed
        self._ends = []  # rows up to the end of each epoch
        self._recent: dict[int, PackPlan] = {}
        self._lock = threading.Lock()

    def __getstate__(self):
        with self._lock:
            return self._arguments, list(self._ends), dict(self._recent)

    def __setstate__(self, state):
        self._arguments, self._ends, self._recent = state
        self._lock = threading.Lock()

    def rows_before(self, epoch: int) -> int:
        """The number of rows of epochs 0 .. epoch-1."""
        with self._lock:
            self._extend(epoch)
            return self._ends[epoch - 1] if epoch else 0

    def __getitem__(self, row: int) -> np.ndarray:
        with self._lock:
            while not self._ends or self._ends[-1] <= row:
                self._extend(len(self._ends) + 1)
            epoch = bisect.bisect_right(self._ends, row)
            first = self._ends[epoch - 1] if epoch else 0
            return self._plan(epoch)[row - first]

    def _extend(self, epochs: int) -> None:
        while len(self._ends) < epochs:
            last = self._ends[-1] if self._ends else 0
            self._ends.append(last + len(self._plan(len(self._ends))))

    def _plan(self, epoch: int) -> PackPlan:
        if epoch not in self._recent:
            lengths, tiles, f, seed = self._arguments
            self._recent[epoch] = plan_rows(
                lengths, tiles, f.length, f.tiles, seed, epoch, f.packing
            )
            while len(self._recent) > 2:
                self._recent.pop(next(iter(self._recent)))
        return self._recent[epoch]
