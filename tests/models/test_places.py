"""Where tokens are on a picture, compared with the pixels that each of them is made of."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from llava_jax.data.media import preprocess
from llava_jax.models.anyres import NEXT_GRIDS, Tiling
from llava_jax.models.images import ImageSpec
from llava_jax.models.places import picture_map
from llava_jax.models.video import VideoSpec
from tests.tiny_model import CONFIG, VISION

SIDE, PATCH = 56, 14
BLACK = {"mean": (0.0, 0.0, 0.0)}  # padding adds nothing to a sum of pixels
SMALL_GRIDS = tuple((columns, rows) for columns in range(1, 4) for rows in range(1, 4))


def config_of(mode: str, tiling: Tiling | None = None, side: int = SIDE, video=None, **changes):
    vision = dataclasses.replace(VISION, patch_size=PATCH)
    image = ImageSpec(side, mode, tiling=tiling, video=video, **BLACK)
    return dataclasses.replace(CONFIG, vision=vision, image=image, **changes)


CONFIGS = {
    "square": config_of("square"),
    "pad": config_of("pad"),
    "resize": config_of("resize"),
    "pixels that no patch has": config_of("pad", side=60),
    "folded": config_of("pad", projector="pixel_shuffle2_mlp2x_gelu"),
    "class token": config_of("square", keep_class_token=True),
    "first patch dropped": dataclasses.replace(
        config_of("square", drop_first_patch=True),
        vision=dataclasses.replace(VISION, patch_size=PATCH, class_token=False),
    ),
    "next": config_of("anyres", Tiling(NEXT_GRIDS)),
    "spatial": config_of("anyres", Tiling(NEXT_GRIDS, merge="spatial")),
    "flat": config_of("anyres", Tiling(NEXT_GRIDS, merge="flat")),
    "shrunk": config_of("anyres", Tiling(SMALL_GRIDS, cap=2, one_view=True)),
    "pooled videos": config_of("pad", video=VideoSpec(pool="average_before_projector")),
}
SIZES = [(120, 120), (200, 90), (90, 200), (31, 40), (400, 150), (130, 500)]


def ramp(size: tuple[int, int]) -> np.ndarray:
    """Levels [H, W] that differ at every place, by so little that resizing keeps their means."""
    width, height = size
    return 40 + 80 * np.arange(width) / width + 80 * np.arange(height)[:, None] / height


def seen_levels(config, size: tuple[int, int], several: bool) -> np.ndarray:
    """The mean level of the pixels that each token is made of; 0 for newline and class token."""
    picture = Image.fromarray(np.repeat(ramp(size)[..., None], 3, axis=2).round().astype(np.uint8))
    tiles = preprocess(picture, config.image, several=several)[..., 0].astype(float)
    cell = PATCH * (2 if "shuffle" in config.projector else 1)
    count = config.image.size // cell
    cut = tiles[:, : count * cell, : count * cell].reshape(-1, count, cell, count, cell)
    of_tile = cut.mean((2, 4)).reshape(len(tiles), -1)
    if config.keep_class_token:
        of_tile = np.pad(of_tile, [(0, 0), (1, 0)])
    of_tile = of_tile[:, 1:] if config.drop_first_patch else of_tile
    of_tile = np.pad(of_tile, [(0, 0), (0, config.tokens_per_tile - of_tile.shape[1])])
    (layout,) = config.layouts([size], several)
    features = layout.features.reshape(len(layout), -1)
    weights = np.ones(features.shape) if layout.weights is None else layout.weights
    shown = np.where(features >= 0, of_tile.reshape(-1)[np.maximum(features, 0)], 0)
    return (shown * weights).sum(1)


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_token_is_where_its_pixels_are(name, size, several):
    config = CONFIGS[name]
    expected = seen_levels(config, size, several)
    maps = picture_map(config, size, np.eye(len(expected)), several)
    assert maps.shape == (len(expected), size[1], size[0]) and (maps >= 0).all()
    found = (maps * ramp(size)).sum((1, 2))
    assert np.abs(found - expected).max() < 3


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_sum_is_kept_but_for_padding_and_tokens_without_a_place(name, size):
    config = CONFIGS[name]
    (layout,) = config.layouts([size])
    values = np.random.default_rng(0).random((2, len(layout)))
    features = layout.features.reshape(len(layout), -1)
    placed = (features >= 0).any(1)
    placed &= ~(config.keep_class_token & (features[:, 0] == 0))
    whole = picture_map(config, size, values)
    share = picture_map(config, size, np.eye(len(layout))).sum((1, 2))  # of each, on the picture
    assert (share <= 1 + 1e-5).all() and (share[~placed] == 0).all()
    np.testing.assert_allclose(whole.sum((1, 2)), values @ share, rtol=1e-5)
    if config.image.mode in ("square", "resize"):
        np.testing.assert_allclose(share[placed], 1, rtol=1e-5)
    small = picture_map(config, size, values, shape=(5, 7))
    assert small.shape == (2, 5, 7)
    np.testing.assert_allclose(small.sum((1, 2)), whole.sum((1, 2)), rtol=1e-5)


def test_what_is_cropped_away_is_not_seen():
    values = np.ones(16)
    seen = picture_map(CONFIGS["square"], (200, 100), values).sum(0) > 0
    assert not seen[:49].any() and seen[51:149].all() and not seen[151:].any()


def test_a_map_peaks_where_the_token_of_the_largest_value_is():
    """Of a picture twice as wide as high, the last cell of the second of two tiles."""
    config = CONFIGS["next"]
    (layout,) = config.layouts([(224, 112)])
    values = np.zeros(len(layout))
    values[-2] = 1  # the last one is a newline
    found = picture_map(config, (224, 112), values)
    rows, columns = np.nonzero(found == found.max())
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (84, 111, 196, 223)
