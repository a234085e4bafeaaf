"""Where on a picture its tokens are: values of tokens become a map of the picture's pixels.

The way of `images` backwards: a token shows features, a feature is a cell of a tile, a tile is a
part of a view, and a view is the picture padded, resized and cut. NumPy only.

n tokens, P features of a tile, R rows and C columns of the cells of a view, H height, W width.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from llava_jax.models.images import Layout, View, views
from llava_jax.models.projector import ProjectorSpec

if TYPE_CHECKING:
    from llava_jax.models.images import Size
    from llava_jax.models.llava import LlavaConfig


def picture_map(
    config: "LlavaConfig",
    size: "Size",
    values: np.ndarray,
    several: bool = False,
    shape: tuple[int, int] | None = None,
) -> np.ndarray:
    """Each token's value, spread evenly over the pixels that the token shows.

    A picture of 4 x 2 pixels that is padded to a square and seen as 2 x 2 cells. Each cell shows
    two pixels of the picture and two of padding, where half of its value remains:

        values  8 0     map  2 2 0 0     sum of the values 8, of the map 4
                0 0          0 0 0 0

    What a token shows besides the picture has no place on the map: padding, a newline, a class
    token. Otherwise the map has the sum of the values. The views of AnyRes are added up.

    Args:
      size: (width, height) of the picture.
      values: float[..., n], of the tokens of its layout.
      several: it is one of several pictures of a prompt.
      shape: (H, W) of the map, which covers the whole picture; by default a value for each pixel.

    Returns:
      float32[..., H, W].
    """
    (layout,) = config.layouts([size], several)
    tiles = _on_cells(config, layout, np.asarray(values, np.float64))  # [..., tiles, R, C]
    height, width = shape or size[::-1]
    result = np.zeros((*tiles.shape[:-3], height, width))
    first = 0
    for view in views(config.image, size, several):
        columns, rows = (side // config.image.size for side in view.cut)
        cells = tiles[..., first : first + rows * columns, :, :]
        first += rows * columns
        cells = cells.reshape(*cells.shape[:-3], rows, columns, *cells.shape[-2:])
        cells = cells.swapaxes(-3, -2)
        cells = cells.reshape(*cells.shape[:-4], rows * cells.shape[-3], -1)  # [..., R, C]
        across, down = _covers(config, view, size, (height, width))
        result += down.T @ cells @ across
    return result.astype(np.float32)


def cells_of_tile(config: "LlavaConfig") -> int:
    """Cells along a side of a tile: patches, or the squares of them that a projector folds."""
    patches = config.image.size // config.vision.patch_size
    return patches // ProjectorSpec.parse(config.projector).fold


def _on_cells(config: "LlavaConfig", layout: Layout, values: np.ndarray) -> np.ndarray:
    """Values of tokens [..., n] -> of the cells of each tile [..., tiles, side, side]."""
    features = layout.features.reshape(len(layout), -1)  # [n, taps]
    weights = np.ones(features.shape) if layout.weights is None else layout.weights
    token, tap = np.nonzero(features >= 0)
    per_tile, side = config.tokens_per_tile, cells_of_tile(config)
    tile, feature = np.divmod(features[token, tap], per_tile)
    # A class token stands before the cells; a first patch that is dropped is a cell without one.
    before = int(config.keep_class_token and config.vision.class_token)
    cell = feature - before + int(config.drop_first_patch)
    on_grid = (0 <= cell) & (cell < side * side)
    place = (tile * side * side + cell)[on_grid]
    shown = values[..., token] * weights[token, tap]
    sums = np.zeros((*values.shape[:-1], layout.tiles * side * side))
    np.add.at(sums, (..., place), shown[..., on_grid])
    return sums.reshape(*values.shape[:-1], layout.tiles, side, side)


def _covers(
    config: "LlavaConfig", view: View, size: "Size", shape: tuple[int, int]
) -> Iterator[np.ndarray]:
    """Across, then down: the share of each cell of a line that is on each pixel of the map's."""
    tile, cells = config.image.size, cells_of_tile(config)
    cell = config.vision.patch_size * ProjectorSpec.parse(config.projector).fold  # pixels of it
    axes = zip(view.on_picture(size), view.cut, size, shape[::-1], strict=True)
    for (start, scale), cut, side, pixels in axes:
        # A tile may end in pixels that are less than a patch, which nothing sees.
        lows = (np.arange(0, cut, tile)[:, None] + np.arange(cells) * cell).reshape(-1, 1)
        lows, highs = start + scale * lows, start + scale * (lows + cell)
        edges = np.linspace(0, side, pixels + 1)
        overlap = np.minimum(highs, edges[1:]) - np.maximum(lows, edges[:-1])
        yield np.maximum(overlap, 0) / (highs - lows)  # [cells, pixels]
