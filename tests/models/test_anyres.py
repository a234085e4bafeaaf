"""AnyRes against transformers: how many tokens a size has, and which features they are."""

import dataclasses
import types

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
from transformers.models.llava_next import modeling_llava_next as next_model  # noqa: E402
from transformers.models.llava_next.processing_llava_next import (  # noqa: E402
    LlavaNextProcessor,
)
from transformers.models.llava_onevision import (  # noqa: E402
    modeling_llava_onevision as onevision_model,
)
from transformers.models.llava_onevision.processing_llava_onevision import (  # noqa: E402
    LlavaOnevisionProcessor,
)

from llava_jax.models import anyres  # noqa: E402
from llava_jax.models.gathering import mix_rows  # noqa: E402
from llava_jax.models.images import ImageSpec, layouts  # noqa: E402
from llava_jax.models.taps import NEWLINE, TAPS, inverse  # noqa: E402
from llava_jax.models.video import VideoSpec  # noqa: E402

# Both lists as transformers reads them: (height, width), of 336 and of 384 pixels.
NEXT_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
ONEVISION_PINPOINTS = [
    [384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)
]
NEXT = ImageSpec(
    336, "anyres", tiling=anyres.Tiling(tuple((w // 336, h // 336) for h, w in NEXT_PINPOINTS))
)
ONEVISION = ImageSpec(
    384,
    "anyres",
    tiling=anyres.Tiling(
        tuple((w // 384, h // 384) for h, w in ONEVISION_PINPOINTS), cap=9, one_view=True
    ),
    video=VideoSpec(),
)
# The table of LLaVA-NeXT's and OneVision's token counts, made with transformers 5.24.
COUNTS = {
    (1, 1): (1176, 1485),
    (300, 200): (1464, 1261),
    (640, 480): (2340, 2929),
    (480, 640): (2352, 2943),
    (1000, 600): (1948, 4665),
    (1920, 1080): (1948, 7269),
    (2480, 3508): (2256, 7353),
    (3000, 300): (1160, 3500),
    (10000, 100): (576, 892),
    (100, 10000): (648, 1053),
    (2304, 2304): (2928, 7371),
    (951, 1154): (2544, 8765),
}
EXTREME = [
    (1, 1),
    (1, 500),
    (500, 1),
    (10000, 100),
    (100, 10000),
    (13, 4097),
    (1128, 47),
    (423, 188),
]


@pytest.mark.parametrize("size", COUNTS)
def test_counts_of_the_table(size):
    found = [len(layouts(spec, per, [size])[0]) for spec, per in ((NEXT, 576), (ONEVISION, 729))]
    assert tuple(found) == COUNTS[size]


def test_no_picture_takes_more_than_the_most_tokens():
    rng = np.random.default_rng(0)
    sides = np.exp(rng.uniform(0, np.log(4000), (4000, 2))).astype(int)
    for spec, per_tile, most in ((NEXT, 576, 2928), (ONEVISION, 729, 8829)):
        assert anyres.most_tokens(spec.tiling, int(per_tile**0.5)) == most
        sizes = [*map(tuple, sides.tolist()), *EXTREME, *COUNTS]
        assert 0.99 * most < max(len(layouts(spec, per_tile, [size])[0]) for size in sizes) <= most
    flat = dataclasses.replace(NEXT.tiling, merge="flat")
    assert anyres.most_tokens(flat, 24) == 5 * 576


def processor(kind, side: int, pinpoints, tokens: int):
    image_processor = types.SimpleNamespace(
        image_grid_pinpoints=pinpoints, size={"shortest_edge": side, "height": side}
    )
    fake = object.__new__(kind)
    fake.image_processor, fake.patch_size = image_processor, 14
    fake.vision_feature_select_strategy, fake.num_additional_image_tokens = "full", 0
    fake.num_image_tokens, fake.vision_aspect_ratio = tokens, "anyres_max_9"
    return fake


@pytest.mark.parametrize("family", ["next", "onevision"])
def test_counts_are_those_of_the_processor(family):
    rng = np.random.default_rng(0)
    sizes = [*EXTREME, *rng.integers(1, 2601, (600, 2)).tolist()]
    if family == "next":
        spec, per_tile = NEXT, 576
        theirs = processor(LlavaNextProcessor, 336, NEXT_PINPOINTS, 576)
        count = lambda w, h: theirs._get_number_of_features(h, w, 336, 336)
    else:
        spec, per_tile = ONEVISION, 729
        theirs = processor(LlavaOnevisionProcessor, 384, ONEVISION_PINPOINTS, 729)
        count = lambda w, h: theirs._get_number_of_features(h, w, 384, 384)
    for width, height in sizes:
        (found,) = layouts(spec, per_tile, [(width, height)])
        assert len(found) == count(width, height), (width, height)


def gathered(layout, features: np.ndarray, newline: np.ndarray) -> np.ndarray:
    """The tokens [n, D] that a layout makes of features [tiles, P, D]."""
    flat = features.reshape(-1, features.shape[-1])
    ids = layout.features if layout.weights is None else layout.features[:, 0]
    if layout.weights is None:
        tokens = flat[np.maximum(ids, 0)]
    else:
        tokens = np.asarray(mix_rows(jnp.asarray(flat), layout.features, layout.weights))
    return np.where((ids == NEWLINE)[:, None], newline, tokens)


def small(spec: ImageSpec, side: int) -> tuple[ImageSpec, list]:
    """The spec with tiles of side x side cells of one pixel, and its pinpoints (height, width)."""
    grids = spec.tiling.grids
    pinpoints = [[rows * side, columns * side] for columns, rows in grids]
    return dataclasses.replace(spec, size=side), pinpoints


@pytest.mark.parametrize("family", ["next", "onevision"])
def test_tokens_are_the_features_that_the_model_packs(family):
    rng = np.random.default_rng(1)
    side, width = (24, 3) if family == "next" else (27, 3)
    spec, pinpoints = small(NEXT if family == "next" else ONEVISION, side)
    model = types.SimpleNamespace(
        config=types.SimpleNamespace(
            vision_config=types.SimpleNamespace(image_size=side, patch_size=1),
            image_grid_pinpoints=pinpoints,
        )
    )
    newline = rng.normal(size=width).astype(np.float32)
    for size in [*EXTREME, *rng.integers(1, 300, (40, 2)).tolist()]:
        (layout,) = layouts(spec, side * side, [tuple(size)])
        features = rng.normal(size=(layout.tiles, side * side, width)).astype(np.float32)
        arguments = (
            [torch.tensor(features)],
            torch.tensor([size[::-1]]),
        )
        if family == "next":
            packed, _ = next_model.LlavaNextModel.pack_image_features(
                model, *arguments, "default", torch.tensor(newline)
            )
        else:
            packed, _ = onevision_model.LlavaOnevisionModel.pack_image_features(
                model, *arguments, torch.tensor(newline), "anyres_max_9"
            )
        ours = gathered(layout, features, newline)
        np.testing.assert_allclose(ours, packed[0].numpy(), atol=1e-6, err_msg=str(size))


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_a_video_is_pooled_as_onevision_does(frames):
    side, width = 27, 3
    features = np.random.default_rng(2).normal(size=(frames, side * side, width))
    features = features.astype(np.float32)
    model = types.SimpleNamespace(
        config=types.SimpleNamespace(
            vision_config=types.SimpleNamespace(image_size=side, patch_size=1)
        )
    )
    pooled = onevision_model.LlavaOnevisionModel.apply_pooling(model, torch.tensor(features))
    (layout,) = layouts(ONEVISION, side * side, [(640, 480, frames)])
    newline = np.zeros(width, np.float32)
    ours = gathered(layout, features, newline)
    assert len(ours) == 196 * frames + 1
    np.testing.assert_allclose(ours[:-1], pooled.reshape(-1, width).numpy(), atol=1e-6)


@pytest.mark.parametrize(
    "newline, tokens", [("no_token", 980), ("one_token", 981), ("frame", 985), ("grid", 1050)]
)
def test_newlines_of_a_video(newline, tokens):
    spec = dataclasses.replace(ONEVISION, video=VideoSpec(newline=newline))
    (layout,) = layouts(spec, 729, [(640, 480, 5)])
    ends = np.flatnonzero(layout.features[:, 0] == NEWLINE)
    assert len(layout) == tokens
    assert len(ends) == {"no_token": 0, "one_token": 1, "frame": 5, "grid": 70}[newline]
    assert not len(ends) or ends[-1] == tokens - 1


def test_a_video_pooled_in_the_encoder_shows_the_features_behind_the_others():
    spec = dataclasses.replace(
        NEXT, video=VideoSpec("square", "average_before_projector", "no_token")
    )
    assert spec.taps == 1
    (layout,) = layouts(spec, 576 + 144, [(336, 336, 3)])
    starts = np.arange(3)[:, None] * 720 + 576
    assert layout.features.tolist() == (starts + np.arange(144)).reshape(-1).tolist()
    (picture,) = layouts(spec, 576 + 144, [(640, 480)])
    assert len(picture) == 2340  # pictures do not look at them


def test_one_of_several_pictures_is_one_view_with_a_newline():
    pair = layouts(ONEVISION, 729, [(640, 480), (1920, 1080)])
    assert [(layout.tiles, len(layout), layout.grid) for layout in pair] == [(1, 730, None)] * 2
    assert [layout.features[-1, 0] for layout in pair] == [NEWLINE] * 2
    tiled = dataclasses.replace(
        ONEVISION, tiling=dataclasses.replace(ONEVISION.tiling, one_view=False)
    )
    pair = layouts(tiled, 729, [(640, 480), (1920, 1080)])
    assert [layout.tiles for layout in pair] == [5, 16]
    with_video = layouts(ONEVISION, 729, [(640, 480), (640, 480, 2)])
    assert with_video[0].tiles == 5  # one picture is alone, whatever videos there are


def test_the_order_of_the_sides_decides_ties():
    """The original reads the list that transformers reads as (height, width) the other way."""
    original = dataclasses.replace(NEXT, tiling=anyres.Tiling(anyres.NEXT_GRIDS, rounded=False))
    found = {size: len(layouts(original, 576, [size])[0]) for size in ((300, 200), (200, 300))}
    assert found == {(300, 200): 976, (200, 300): 1476}
    assert len(layouts(NEXT, 576, [(200, 300)])[0]) == 984


@pytest.mark.parametrize("rounded, tokens", [(True, [868, 2104]), (False, [722, 1994])])
def test_rounding_of_the_size_without_padding(rounded, tokens):
    found = []
    for spec, per_tile, size in ((NEXT, 576, (1128, 47)), (ONEVISION, 729, (423, 188))):
        tiling = dataclasses.replace(spec.tiling, rounded=rounded)
        spec = dataclasses.replace(spec, tiling=tiling)
        found.append(len(layouts(spec, per_tile, [size])[0]))
    assert found == tokens


@pytest.mark.parametrize("spec, per_tile", [(NEXT, 576), (ONEVISION, 729)])
def test_no_feature_is_taken_more_often_than_the_inverse_has_room(spec, per_tile):
    for size in [(951, 1154), (2304, 2304), (3024, 4032), (7680, 4320), (1001, 999)]:
        (layout,) = layouts(spec, per_tile, [size])
        if layout.weights is None:
            used = layout.features[layout.features >= 0]
            assert len(np.unique(used)) == len(used)
        else:
            places = inverse(layout.features, layout.weights, layout.tiles * per_tile)
            used = places[places >= 0]
            assert len(used) == np.count_nonzero(layout.weights)
            feature = np.repeat(np.arange(len(places)), TAPS).reshape(places.shape)[places >= 0]
            assert (layout.features.reshape(-1)[used] == feature).all()


def test_merges_of_the_original_without_newlines():
    for merge in ("flat", "spatial"):
        spec = dataclasses.replace(NEXT, tiling=dataclasses.replace(NEXT.tiling, merge=merge))
        (layout,) = layouts(spec, 4, [(672, 300)])
        assert not spec.newline and layout.tiles == 3 and len(layout) == 12
    assert layout.features.tolist() == [0, 1, 2, 3, 4, 5, 8, 9, 6, 7, 10, 11]


def test_the_words_of_a_start_tell_tiles_from_one_square():
    from tests.tiny_model import CONFIG

    assert CONFIG.image_words == "8 pixels, 4 tokens"
    tiling = anyres.Tiling(((2, 1),))
    tiled = dataclasses.replace(CONFIG, image=ImageSpec(8, "anyres", tiling=tiling))
    assert tiled.image_words == "tiles of 8 pixels, up to 14 tokens"
