"""The arithmetic of AnyRes (LLaVA-NeXT, OneVision): tiles of a picture and the features they leave.

A picture is resized into a grid of tiles, padded with black, and every tile is encoded. What the
tiles give is put together to one grid of feature *cells*, those of the padding are cut off, and in
OneVision a grid that is still large is shrunk. Sizes are (width, height), grids (columns, rows).
"""

import dataclasses
import math
import re
from collections.abc import Sequence

Size = tuple[int, int]  # width, height, or columns, rows

# Pinpoints of LLaVA-NeXT in tiles; their order decides ties, and the original reads it so.
NEXT_GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
MERGES = ("spatial_unpad", "spatial", "flat")


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How the tiles of a picture are chosen, and what becomes of their features.

    Attributes:
      grids: (columns, rows) that a picture may be cut into (image_grid_pinpoints); of two that are
        equally good the first is taken.
      merge: `spatial_unpad`: one grid without its padding, a newline after each row; `spatial`: one
        grid with it, no newline; `flat`: tile after tile, no newline (mm_patch_merge_type).
      rounded: whether the size without padding is rounded at the seventh decimal before it is cut
        to a whole number, as transformers does since 4.49; the original and older ones do not.
      cap: with N above 0, features of much more than N tiles are shrunk to about N (anyres_max_N).
      one_view: of several pictures in a prompt each is one tile, padded to a square.
    """

    grids: tuple[Size, ...] = NEXT_GRIDS
    merge: str = "spatial_unpad"
    rounded: bool = True
    cap: int = 0
    one_view: bool = False

    def __post_init__(self):
        if self.merge not in MERGES:
            raise ValueError(f"merge is {self.merge!r}: choose one of {', '.join(MERGES)}")
        if not self.grids:
            raise ValueError("grids is empty: give at least one (columns, rows)")
        if self.cap < 0:
            raise ValueError(f"cap is {self.cap}: give a number of tiles, or 0 for none")

    def up_to(self, tiles: int) -> "Tiling":
        """With the grids of at most so many tiles, without the base view.

        Raises:
          ValueError: there is none.
        """
        small = tuple(grid for grid in self.grids if grid[0] * grid[1] <= tiles)
        if not small:
            least = min(columns * rows for columns, rows in self.grids)
            raise ValueError(f"the smallest of the model's grids has {least} tiles")
        return dataclasses.replace(self, grids=small)

    @property
    def newline(self) -> bool:
        """Whether rows of features end with the learnt newline."""
        return self.merge == "spatial_unpad"


def read_grids(text: str) -> tuple[Size, ...]:
    """The grids that a text names: one after the other, or all from the first to the last.

    >>> read_grids("1x2 2x1"), read_grids("1x1..2x2")
    (((1, 2), (2, 1)), ((1, 1), (1, 2), (2, 1), (2, 2)))

    Raises:
      ValueError: it is no such text.
    """
    grid = r"[1-9]\d?x[1-9]\d?"
    if not re.fullmatch(rf"\s*({grid}\s*\.\.\s*{grid}|{grid}([,\s]+{grid})*)\s*", text):
        raise ValueError(
            f"grids is {text!r}: give columns x rows, as in '1x2 2x1 2x2', or '1x1..6x6' for all "
            "between"
        )
    found = tuple((int(c), int(r)) for c, r in re.findall(r"(\d+)x(\d+)", text))
    if ".." not in text:
        return found
    (first_column, first_row), (last_column, last_row) = found
    rows = range(first_row, last_row + 1)
    return tuple((c, r) for c in range(first_column, last_column + 1) for r in rows)


def choose_grid(grids: Sequence[Size], side: int, size: Size) -> Size:
    """The grid of tiles in which a picture keeps most of its pixels, and wastes fewest.

    Source: `select_best_resolution` of transformers and LLaVA-NeXT, which differ in the order of
    the sides in their lists alone.

    Args:
      grids: (columns, rows), of which the first of equals wins.
      side: S, pixels of a tile.
      size: of the picture.
    """

    def worth(grid: Size) -> tuple[int, int]:
        width, height = grid[0] * side, grid[1] * side
        scale = min(width / size[0], height / size[1])
        kept = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        return kept, kept - width * height

    return max(grids, key=worth)  # max takes the first of equals


def fitted(size: Size, canvas: Size) -> Size:
    """The largest size of a picture's aspect that fits into a canvas, sides rounded up."""
    scale_x, scale_y = canvas[0] / size[0], canvas[1] / size[1]
    if scale_x < scale_y:
        return canvas[0], min(math.ceil(size[1] * scale_x), canvas[1])
    return min(math.ceil(size[0] * scale_y), canvas[0]), canvas[1]


def kept_cells(size: Size, cells: Size, rounded: bool) -> tuple[slice, slice]:
    """The (rows, columns) of a grid of cells that show the picture and not its padding.

    Either may be empty, for a picture of extreme aspect. Source: `unpad_image`.

    >>> kept_cells((640, 480), (48, 48), True)
    (slice(6, 42, None), slice(0, 48, None))
    """
    (width, height), (columns, rows) = size, cells
    whole = lambda value: int(round(value, 7) if rounded else value)
    if width / height > columns / rows:
        padding = (rows - whole(height * (columns / width))) // 2
        return slice(padding, rows - padding), slice(0, columns)
    padding = (columns - whole(width * (rows / height))) // 2
    return slice(0, rows), slice(padding, columns - padding)


def shrunk(rows: int, columns: int, cells_of_tile: int, cap: int) -> tuple[int, int]:
    """The (rows, columns) that a grid of cells is shrunk to: unchanged unless well over the cap."""
    if not cap:
        return rows, columns
    ratio = math.sqrt(rows * columns / (cap * cells_of_tile))
    return (int(rows // ratio), int(columns // ratio)) if ratio > 1.1 else (rows, columns)


def most_tokens(tiling: Tiling, side: int) -> int:
    """The tokens that no picture has more of, whatever its size.

    side: of the square of a tile's features.

    >>> most_tokens(Tiling(NEXT_GRIDS), 24)
    2928
    """
    if not tiling.newline:
        return side**2 * (1 + max(columns * rows for columns, rows in tiling.grids))
    most = 0
    for grid in tiling.grids:
        columns, rows = (side * tiles for tiles in grid)
        kept = [(row, columns) for row in range(rows % 2, rows + 1, 2)]
        kept += [(rows, column) for column in range(columns % 2, columns + 1, 2)]
        for cells in kept:  # padding is cut off on both sides alike
            high, wide = shrunk(*cells, side**2, tiling.cap)
            most = max(most, high * (wide + 1))
    return side**2 + most
