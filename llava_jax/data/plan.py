"""Which conversations share a row: a pure function of their lengths and a seed."""

from dataclasses import dataclass

import numpy as np

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
    max_length: int,
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
    if len(lengths) and (lengths.max() > max_length or tiles.max() > tiles_per_row):
        raise ValueError("a record is larger than a row")
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch])))
    order = generator.permutation(len(lengths))
    if not packing:
        return PackPlan(np.arange(len(order) + 1), order)
    rows = []
    for start in range(0, len(order), pool):
        some = order[start : start + pool]
        rows += _best_fit(some, lengths[some], tiles[some], max_length, tiles_per_row)
    # A pool's last rows are the emptiest: spread them over the epoch.
    rows = [rows[i] for i in generator.permutation(len(rows))]
    sizes = np.fromiter((len(row) for row in rows), np.int64, len(rows))
    members = np.fromiter((i for row in rows for i in row), np.int64, int(sizes.sum()))
    return PackPlan(np.concatenate([[0], np.cumsum(sizes)]), members)


def _best_fit(records, lengths, tiles, max_length, tiles_per_row) -> list[list[int]]:
    """The rows of one pool; of equal records the one that comes first in it goes first."""
    rows: list[list[int]] = []
    free_tokens, free_tiles = (np.zeros(len(records), np.int64) for _ in range(2))
    longest_first = np.argsort(-lengths, kind="stable")
    for i in longest_first.tolist():
        tokens, images = lengths[i], tiles[i]
        left = free_tokens[: len(rows)] - tokens
        left[(left < 0) | (free_tiles[: len(rows)] < images)] = max_length
        row = int(left.argmin()) if rows else 0
        if not rows or left[row] == max_length:
            row = len(rows)
            rows.append([])
            free_tokens[row], free_tiles[row] = max_length, tiles_per_row
        rows[row].append(int(records[i]))
        free_tokens[row] -= tokens
        free_tiles[row] -= images
    return rows
