"""Pictures as tiles and tokens."""

import numpy as np
import pytest

from llava_jax.models.images import (
    MODES,
    ImageSpec,
    features_in_turn,
    layouts,
    views,
)

SIZES = [(1, 1), (1, 9), (640, 480), (480, 640), (17, 500), (3001, 2)]


@pytest.mark.parametrize("mode", ["square", "pad", "resize"])
@pytest.mark.parametrize("size", SIZES)
def test_the_first_three_modes_make_one_tile_and_show_all_of_it(mode, size):
    (found,) = layouts(ImageSpec(28, mode), 4, [size])
    assert found.tiles == 1 and len(found) == 4 and found.features.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", SIZES)
def test_views_are_cut_into_whole_tiles(mode, size):
    for view in views(ImageSpec(28, mode), size):
        assert min(view.padded + view.resized + view.cut) > 0
        assert view.cut[0] % 28 == view.cut[1] % 28 == 0


def test_views_of_a_wide_picture():
    (square,) = views(ImageSpec(28, "square"), (50, 20))
    assert (square.padded, square.resized, square.cut) == ((50, 20), (70, 28), (28, 28))
    (pad,) = views(ImageSpec(28, "pad"), (50, 20))
    assert (pad.padded, pad.resized, pad.cut) == ((50, 50), (28, 28), (28, 28))
    (resize,) = views(ImageSpec(28, "resize"), (50, 20))
    assert (resize.padded, resize.resized, resize.cut) == ((50, 20), (28, 28), (28, 28))


def test_features_in_turn():
    is_image = np.array([[False, True, True, False], [True, False, False, True]])
    assert features_in_turn(is_image).tolist() == [[-1, 0, 1, -1], [0, -1, -1, 1]]
