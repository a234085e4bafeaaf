"""Which conversations share a row, and the row they make. Pure functions of lengths and seed."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llava_jax.text.tokenization import IGNORE_INDEX, TokenRow
from llava_jax.text.turns import turn_positions

# Records that are packed together. On lengths like the 665K mix's (`tests/data/test_packing.py`) it
# leaves 11.9% of 2,048 tokens empty; by a linear program over a sample 11.6% is the
# least possible, and pools of 8,192 leave 11.9% too.
POOL = 2048


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
    image_counts: np.ndarray,
    max_length: int,
    images_per_row: int,
    seed: int,
    epoch: int,
    packing: bool = True,
    pool: int = POOL,
) -> PackPlan:
    """One epoch's rows: every record once, in an order that (seed, epoch) decides.

    lengths, image_counts: [N] tokens and images of each record; each must fit a row alone.
    With `packing`, best-fit decreasing in pools of the shuffled order, under both budgets: from the
    longest to the shortest, each record of a pool goes to the fullest row that it fits. Without,
    one record a row.
    """
    lengths, image_counts = np.asarray(lengths), np.asarray(image_counts)
    if len(lengths) and (lengths.max() > max_length or image_counts.max() > images_per_row):
        raise ValueError("a record is larger than a row")
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch])))
    order = generator.permutation(len(lengths))
    if not packing:
        return PackPlan(np.arange(len(order) + 1), order)
    rows = []
    for start in range(0, len(order), pool):
        some = order[start : start + pool]
        rows += _best_fit(some, lengths[some], image_counts[some], max_length, images_per_row)
    # A pool's last rows are the emptiest: spread them over the epoch.
    rows = [rows[i] for i in generator.permutation(len(rows))]
    sizes = np.fromiter((len(row) for row in rows), np.int64, len(rows))
    members = np.fromiter((i for row in rows for i in row), np.int64, int(sizes.sum()))
    return PackPlan(np.concatenate([[0], np.cumsum(sizes)]), members)


def _best_fit(records, lengths, image_counts, max_length, images_per_row) -> list[list[int]]:
    """The rows of one pool; of equal records the one that comes first in it goes first."""
    rows: list[list[int]] = []
    free_tokens, free_images = (np.zeros(len(records), np.int64) for _ in range(2))
    longest_first = np.argsort(-lengths, kind="stable")
    for i in longest_first.tolist():
        tokens, images = lengths[i], image_counts[i]
        left = free_tokens[: len(rows)] - tokens
        left[(left < 0) | (free_images[: len(rows)] < images)] = max_length
        row = int(left.argmin()) if rows else 0
        if not rows or left[row] == max_length:
            row = len(rows)
            rows.append([])
            free_tokens[row], free_images[row] = max_length, images_per_row
        rows[row].append(int(records[i]))
        free_tokens[row] -= tokens
        free_images[row] -= images
    return rows


def pack(
    rows: Sequence[TokenRow],
    images: Sequence[np.ndarray],
    max_length: int,
    images_per_row: int,
    image_size: int,
    independent_turns: bool = False,
) -> dict[str, np.ndarray]:
    """Conversations -> one row of a batch, padded to fixed shapes.

    images: the uint8 [S, S, 3] arrays of all rows, in placeholder order. Gives input_ids, labels,
    position_ids and segment_ids, int32 [T] (positions restart in each conversation; segment 0 is
    padding, conversations count from 1), and images, uint8 [I, S, S, 3] (unused slots zero); with
    `independent_turns` also turn_ids, int32 [T], and positions restart with each of them where
    the part that they share ends. Raises ValueError when something does not fit.
    """
    total = sum(len(row) for row in rows)
    slots = sum(len(row.image_spans) for row in rows)
    if total > max_length or slots > images_per_row:
        raise ValueError(f"{total} tokens, {slots} images exceed {max_length}, {images_per_row}")
    if slots != len(images):
        raise ValueError(f"{len(images)} images for {slots} places")
    result = {
        "input_ids": np.zeros(max_length, np.int32),
        "labels": np.full(max_length, IGNORE_INDEX, np.int32),
        "position_ids": np.zeros(max_length, np.int32),
        "segment_ids": np.zeros(max_length, np.int32),
        "images": np.zeros((images_per_row, image_size, image_size, 3), np.uint8),
    }
    if independent_turns:
        result["turn_ids"] = np.zeros(max_length, np.int32)
    start = 0
    for segment, row in enumerate(rows, start=1):
        here = slice(start, start + len(row))
        result["input_ids"][here] = row.input_ids
        result["labels"][here] = row.labels
        result["segment_ids"][here] = segment
        if row.turn_ids is None:
            result["position_ids"][here] = np.arange(len(row))
        else:
            result["position_ids"][here] = turn_positions(row.turn_ids)
            result["turn_ids"][here] = row.turn_ids
        start += len(row)
    for slot, pixels in enumerate(images):
        result["images"][slot] = pixels
    return result
