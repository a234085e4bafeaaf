"""How many tokens a video takes, and where its newlines stand, with the sizes of real models."""

import dataclasses

import numpy as np
import pytest

from llava_jax.errors import LlavaError
from llava_jax.models.images import ImageSpec, layouts
from llava_jax.models.taps import NEWLINE
from llava_jax.models.video import VideoSpec

# SigLIP at 384 gives 27 x 27 features, pooled to 14 x 14; CLIP at 336 24 x 24, pooled to 12 x 12.
TOKENS = {
    "one_token": lambda frames: 196 * frames + 1,
    "grid": lambda frames: 210 * frames,
    "frame": lambda frames: 197 * frames,
    "no_token": lambda frames: 196 * frames,
}
NEWLINES = {
    "one_token": lambda frames: [196 * frames],
    "grid": lambda frames: np.arange(14, 210 * frames, 15),
    "frame": lambda frames: np.arange(196, 197 * frames, 197),
    "no_token": lambda frames: [],
}


def layout_of(newline: str, frames: int):
    spec = ImageSpec(384, "resize", video=VideoSpec(newline=newline))
    return layouts(spec, 729, [(640, 480, frames)])[0]


@pytest.mark.parametrize("newline", TOKENS)
def test_tokens_and_newlines_of_onevision_and_llava_video(newline):
    for frames in range(1, 65):
        layout = layout_of(newline, frames)
        assert layout.tiles == frames and len(layout) == TOKENS[newline](frames)
        (places,) = np.nonzero(layout.features[:, 0] == NEWLINE)
        np.testing.assert_array_equal(places, NEWLINES[newline](frames))
    shown = layout.features[layout.weights > 0]
    assert set(shown) == set(range(64 * 729))  # each feature of each frame is part of a token
    np.testing.assert_allclose(layout.weights.sum(1), layout.features[:, 0] != NEWLINE, atol=1e-6)


def test_tokens_of_next_video():
    spec = ImageSpec(
        336, "square", video=VideoSpec("square", "average_before_projector", "no_token")
    )
    for frames in range(1, 65):
        (layout,) = layouts(spec, 576 + 144, [(640, 480, frames)])
        assert len(layout) == 144 * frames and layout.tiles == frames
        tiles, places = np.divmod(layout.features, 720)
        assert tiles.tolist() == sorted([*range(frames)] * 144) and places.min() == 576
    for mode in ("square", "pad", "resize"):  # a picture of such a model shows no pooled feature
        (layout,) = layouts(dataclasses.replace(spec, mode=mode), 576 + 144, [(640, 480)])
        assert layout.features.tolist() == [*range(576)]


def test_a_video_of_no_frames():
    with pytest.raises(LlavaError, match="a video has no frames"):
        layout_of("frame", 0)
