"""Which encoder features a token shows: one, the mean of a few neighbours, or the learnt newline.

Where features are shrunk or pooled, a token mixes up to `TAPS` features. All tokens are written so
here; a model without shrinking keeps the first of each alone (`images.Layout`). NumPy only.

R rows and C columns of a grid of features.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

TEXT, NEWLINE = -1, -2  # in feature ids: no feature stands here, or the learnt newline
TAPS = 4


class Taps(NamedTuple):
    """Tokens as mixtures of features.

    Attributes:
      features: int32[..., TAPS], feature ids; TEXT for none. A newline has NEWLINE in the first.
      weights: float32[..., TAPS], of sum 1, or 0 for a newline.
    """

    features: np.ndarray
    weights: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> "Taps":
        """Each of int[...] feature ids, or NEWLINE, by itself."""
        taps = np.full((*np.shape(features), TAPS), TEXT, np.int32)
        taps[..., 0] = features
        weights = np.zeros(taps.shape, np.float32)
        weights[..., 0] = taps[..., 0] >= 0
        return cls(taps, weights)

    def in_a_row(self, axes: int = 0) -> "Taps":
        """The first axes are kept, and all tokens behind them follow each other, row by row."""
        return Taps(*(x.reshape(*x.shape[:axes], -1, TAPS) for x in self))

    def ended(self) -> "Taps":
        """A newline behind the tokens of each row, the last axis of tokens."""
        behind = [(0, 0)] * (self.features.ndim - 2) + [(0, 1), (0, 0)]
        features = np.pad(self.features, behind, constant_values=TEXT)
        features[..., -1, 0] = NEWLINE
        return Taps(features, np.pad(self.weights, behind))


def join(parts: Sequence[Taps]) -> Taps:
    """Tokens [n] of several parts, one after the other."""
    return Taps(*map(np.concatenate, zip(*parts, strict=True)))


def bilinear(cells: np.ndarray, rows: int, columns: int) -> Taps:
    """A grid of features shrunk, as torch's bilinear `interpolate` does without antialias.

    Args:
      cells: int[R, C], feature ids.
      rows, columns: of the result, at most R and C.

    Returns:
      Taps [rows, columns].
    """
    (y0, y1, y), (x0, x1, x) = _neighbours(len(cells), rows), _neighbours(cells.shape[1], columns)
    features = [cells[np.ix_(v, u)] for v in (y0, y1) for u in (x0, x1)]
    weights = [np.outer(v, u) for v in (1 - y, y) for u in (1 - x, x)]
    return Taps(np.stack(features, -1).astype(np.int32), np.stack(weights, -1).astype(np.float32))


def _neighbours(old: int, new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each of `new` places on a line of `old`: its two neighbours, the second's weight."""
    scale = float(np.float32(old / new))  # torch has it in float32, and rounds the place once
    place = np.maximum((np.arange(new) + 0.5) * scale - 0.5, 0).astype(np.float32)
    first = place.astype(int)
    second = np.minimum(first + 1, old - 1)
    return first, second, place - first.astype(np.float32)


def average(cells: np.ndarray) -> Taps:
    """Squares of 2 x 2 of int[R, C] feature ids -> Taps [R // 2, C // 2]."""
    rows, columns = len(cells) // 2, cells.shape[1] // 2
    squares = cells[: 2 * rows, : 2 * columns].reshape(rows, 2, columns, 2).swapaxes(1, 2)
    features = squares.reshape(rows, columns, TAPS).astype(np.int32)
    return Taps(features, np.full(features.shape, 0.25, np.float32))


def inverse(features: np.ndarray, weights: np.ndarray, count: int) -> np.ndarray:
    """Where each feature is used: int32[count, TAPS], of which tap t of token n is n * TAPS + t.

    The gradient of a weighted gather is a weighted gather by these. TEXT fills up.

        features  0  1 -1 -1     weights  .5 .5 0 0     inverse of 2  0 -1 -1 -1
                  1 -1 -1 -1              1  0  0 0                   1  4 -1 -1

    Args:
      features, weights: [n, TAPS], as in `Taps`.

    Raises:
      ValueError: a feature is used more than TAPS times.
    """
    used = np.flatnonzero((features.reshape(-1) >= 0) & (weights.reshape(-1) > 0))
    feature = features.reshape(-1)[used]
    order = np.argsort(feature, kind="stable")
    used, feature = used[order], feature[order]
    place = np.arange(len(used)) - np.searchsorted(feature, feature)
    if len(place) and place.max() >= TAPS:
        raise ValueError(f"feature {feature[place.argmax()]} is used more than {TAPS} times")
    places = np.full((count, TAPS), TEXT, np.int32)
    places[feature, place] = used
    return places


def feature_places(feature_ids: np.ndarray, features: int) -> np.ndarray:
    """The inverse of feature ids: where each feature stands, TEXT for one that stands nowhere.

    The gradient of a gather by `feature_ids` is a gather by these places.

    >>> feature_places(np.array([-1, 0, 1, 3, -1]), 4)
    array([ 1,  2, -1,  3], dtype=int32)

    Args:
      feature_ids: int32[T], no feature twice.
      features: how many there are.
    """
    places = np.full(features, TEXT, np.int32)
    used = np.flatnonzero(feature_ids >= 0)
    places[feature_ids[used]] = used
    return places
