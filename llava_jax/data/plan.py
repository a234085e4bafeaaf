"""Which conversations share a row: a pure function of their lengths and a seed."""

import bisect
import threading
from dataclasses import dataclass

import numpy as np

from llava_jax.data.rows import RowFormat

POOL = 2048  # records that are packed together; larger pools fill rows no better


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
    order = generator.permutation(len(lengths))
    if not packing:
        return PackPlan(np.arange(len(order) + 1), order)
    rows = []
    for start in range(0, len(order), pool):
        some = order[start : start + pool]
        rows += _best_fit(some, lengths[some], tiles[some], row_length, tiles_per_row)
    # A pool's last rows are the emptiest: spread them over the epoch.
    rows = [rows[i] for i in generator.permutation(len(rows))]
    sizes = np.fromiter((len(row) for row in rows), np.int64, len(rows))
    members = np.fromiter((i for row in rows for i in row), np.int64, int(sizes.sum()))
    return PackPlan(np.concatenate([[0], np.cumsum(sizes)]), members)


def _best_fit(records, lengths, tiles, row_length, tiles_per_row) -> list[list[int]]:
    """The rows of one pool; of equal records the one that comes first in it goes first."""
    rows: list[list[int]] = []
    free_tokens, free_tiles = (np.zeros(len(records), np.int64) for _ in range(2))
    longest_first = np.argsort(-lengths, kind="stable")
    for i in longest_first.tolist():
        tokens, needed = lengths[i], tiles[i]
        left = free_tokens[: len(rows)] - tokens
        left[(left < 0) | (free_tiles[: len(rows)] < needed)] = row_length
        row = int(left.argmin()) if rows else 0
        if not rows or left[row] == row_length:
            row = len(rows)
            rows.append([])
            free_tokens[row], free_tiles[row] = row_length, tiles_per_row
        rows[row].append(int(records[i]))
        free_tokens[row] -= tokens
        free_tiles[row] -= needed
    return rows


class RowStream:
    """All epochs' rows, one after the other, addressed by number; picklable and thread-safe."""

    def __init__(self, lengths: np.ndarray, tiles: np.ndarray, row_format: RowFormat, seed: int):
        self._arguments = lengths, tiles, row_format, seed
        self._ends = []  # rows up to the end of each epoch
        self._recent: dict[int, PackPlan] = {}
        self._lock = threading.Lock()

    def __reduce__(self):
        return RowStream, self._arguments

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
