"""Boxes: written in each convention, read back, on every kind of picture."""

import math

import numpy as np
import pytest
from PIL import Image

from llava_jax.data.boxes import BINS, CONVENTIONS, Boxes, draw_boxes
from llava_jax.data.media import preprocess
from llava_jax.errors import LlavaError
from llava_jax.models.anyres import Tiling
from llava_jax.models.images import ImageSpec, box_view

SPECS = {
    "pad": ImageSpec(336, "pad"),
    "resize": ImageSpec(336, "resize"),
    "square": ImageSpec(336, "square"),
    "anyres": ImageSpec(336, "anyres"),
    "one view": ImageSpec(336, "anyres", tiling=Tiling(one_view=True)),
}
PATCH = 14


def test_what_each_convention_writes():
    def written(convention, mode="pad", box=(160, 120, 480, 479), size=(640, 480)):
        return Boxes(convention, ImageSpec(336, mode)).write(box, size)

    assert written("llava") == "[0.25, 0.31, 0.75, 0.87]"  # 80 pixels of padding above
    assert written("llava", box=(0, 0, 640, 480)) == "[0.0, 0.12, 1.0, 0.88]"
    assert written("llava", "resize") == "[0.25, 0.25, 0.75, 1.0]"
    assert written("llava", "square") == "[0.17, 0.25, 0.83, 1.0]"  # 80 pixels cut at either side
    assert written("llava", "anyres") == written("llava")
    assert written("qwen_1000") == written("qwen_1000", "anyres") == "[250, 250, 750, 998]"
    assert written("pixel") == written("pixel", "square") == "[160, 120, 480, 479]"
    tokens = "<object><patch_index_0264><patch_index_1015></object>"  # (8, 8) to (23, 31)
    assert written("kosmos") == tokens


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("mode", SPECS)
def test_a_box_comes_back(convention, mode):
    """10,000 random pictures and boxes over all: within half of what the convention rounds to."""
    rng = np.random.default_rng(0)
    boxes = Boxes(convention, SPECS[mode])
    for _ in range(500):
        several = bool(rng.integers(2))
        size = tuple(int(side) for side in np.exp(rng.uniform(np.log(8), np.log(4000), 2)))
        x, y = (np.sort(rng.uniform(0, side, 2)) for side in size)
        box = (x[0], y[0], x[1], y[1])
        square = shown_square(SPECS[mode], size, several)
        seen = clip(clip(box, square), (0, 0, *size))
        if seen[0] >= seen[2] or seen[1] >= seen[3]:
            with pytest.raises(LlavaError, match="cut away"):
                boxes.write(box, size, several)
            continue
        text = boxes.write(box, size, several)
        (back,) = boxes.read(f"It is at {text}.", size, several)
        frame = boxes.frame(size, several)
        sides = np.tile([frame[2] - frame[0], frame[3] - frame[1]], 2)
        error = np.abs(np.subtract(back, seen))
        steps = {"llava": 0.01, "qwen_1000": 0.001, "pixel": 1 / sides, "kosmos": 1 / BINS}
        one_bin = convention == "kosmos" and is_narrow(seen, frame)  # its outer edges, not centres
        assert (error <= (1 if one_bin else 0.5) * steps[convention] * sides + 1e-6).all()
        # On the tile: within half a pixel of half a patch (of Kosmos-2's own 224 pixels).
        tile = 224 if convention == "kosmos" else 336
        if convention != "pixel" or min(size) >= 24:  # a pixel of a tiny one may exceed a patch
            pixels = tile / np.tile([square[2] - square[0], square[3] - square[1]], 2)
            assert (error * pixels <= PATCH / 2 + 0.5).all()


def shown_square(spec, size, several):
    """The square of the tile in pixels of the picture, by the definition of a View."""
    view = box_view(spec, size, several)
    edges = []
    for axis in range(2):
        pad = (view.padded[axis] - size[axis]) // 2
        more = view.cut[axis] - view.resized[axis]
        cut = math.trunc(more / 2)
        to_picture = lambda u: (u - cut) * view.padded[axis] / view.resized[axis] - pad  # noqa: B023
        edges.append((to_picture(0), to_picture(view.cut[axis])))
    return edges[0][0], edges[1][0], edges[0][1], edges[1][1]


def clip(box, frame):
    low = [max(a, b) for a, b in zip(box[:2], frame[:2], strict=True)]
    return (*low, *(min(a, b) for a, b in zip(box[2:], frame[2:], strict=True)))


def is_narrow(box, frame):
    bins = [(v - f) / (frame[2 + i % 2] - frame[i % 2]) * BINS
            for i, (v, f) in enumerate(zip(box, frame[:2] * 2, strict=True))]  # fmt: skip
    first, last = np.floor(bins[:2]), np.ceil(bins[2:]) - 1
    return (last <= first).any()


@pytest.mark.parametrize("size", [(60, 40), (40, 60), (50, 50), (131, 37)])
@pytest.mark.parametrize("mode", ["pad", "resize", "square"])
def test_a_box_is_where_the_pixels_are(mode, size):
    """A white rectangle on black: its box on the tile is where the tile is white."""
    spec, (width, height) = ImageSpec(112, mode), size
    box = (width // 2 - 9, height // 2 - 6, width // 2 + 7, height // 2 + 8)
    image = Image.new("RGB", size)
    image.paste((255, 255, 255), box)
    white = preprocess(image, spec)[0].min(-1) > 200
    y, x = np.nonzero(white)
    tile = np.array([x.min(), y.min(), x.max() + 1, y.max() + 1]) / 112
    text = Boxes("llava", spec).write(box, size)
    written = np.array([float(value) for value in text.strip("[]").split(", ")])
    assert np.abs(written - tile).max() <= 0.005 + 1.5 / 112


def test_kosmos_bins_are_those_of_transformers():
    kosmos = pytest.importorskip("transformers.models.kosmos2.processing_kosmos2")
    rng, boxes = np.random.default_rng(0), Boxes("kosmos", ImageSpec(224, "resize"))
    for _ in range(300):
        x, y = np.sort(rng.uniform(0, 1, (2, 2)), axis=1)
        if rng.random() < 0.3:  # corners in one row or column of bins
            x[1] = min(x[0] + 0.01, 1.0)
        box = (x[0], y[0], x[1], y[1])
        first, last = kosmos.coordinate_to_patch_index(box, BINS)
        text = f"<object><patch_index_{first:04d}><patch_index_{last:04d}></object>"
        assert boxes.write(tuple(100 * value for value in box), (100, 100)) == text
        expected = kosmos.patch_index_to_coordinate(first, last, BINS)
        np.testing.assert_allclose(boxes.read(text, (1, 1)), [expected], atol=1e-9)


def test_boxes_are_found_in_text():
    def read(text, convention="llava", size=(100, 100)):
        return Boxes(convention).read(text, size)

    assert read("[0.1, 0.2,0.30,1]") == [(10, 20, 30, 100)]
    assert read("It is [.5, 0, 1.0, 1.] or [0,0,1,1].") == [(50, 0, 100, 100), (0, 0, 100, 100)]
    for text in ("", "0.1, 0.2, 0.3, 0.4", "[0.1, 0.2, 0.3]", "[a, b, c, d]", "[0.1 0.2 0.3 0.4]"):
        assert read(text) == []
    both = "<patch_index_0000><patch_index_0033></delimiter_of_multi_objects/>" * 2
    assert read(both, "kosmos", (64, 32)) == [(1, 0.5, 3, 1.5)] * 2
    assert read("<patch_index_0000><patch_index_0000>", "kosmos", (64, 32)) == [(0, 0, 2, 1)]
    # As written: what is drawn is another matter.
    assert read("[0.5, 0.5, 0.2, 2]") == [(50, 50, 20, 200)]
    drawable = Boxes().drawable("[0.5, 0.5, 0.2, 2] [3, 1, 4, 2] [-0.5, 0, 0.5, 2]", (100, 100))
    assert drawable == [(0, 0, 50, 100)]


def test_a_box_lies_on_the_padded_square():
    boxes = Boxes("llava", ImageSpec(mode="pad"))
    # 200 x 100 has 50 pixels above; 101 x 200 has 49 (not 49.5) to the left.
    assert boxes.read("[0.25, 0.25, 0.75, 0.5]", (200, 100)) == [(50, 0, 150, 50)]
    assert boxes.read("[0.25, 0.5, 0.5, 1]", (101, 200)) == [(1, 100, 51, 200)]


def test_what_is_no_box_of_the_picture_is_refused():
    boxes = Boxes()
    for box, fault in {
        (0, 0, float("nan"), 5): r"\[0, 0, nan, 5\] is not finite",
        (0, 0, math.inf, 5): "is not finite",
        (5, 0, 5, 5): r"\[5, 0, 5, 5\] has no area: left must be less than right",
        (0, 6, 5, 5): "has no area",
        (0, 0, 101.5, 5): "is outside the picture of 100x50 pixels",
        (0, -2, 5, 5): "is outside",
        (0, 50.2, 5, 50.9): "is outside",
    }.items():
        with pytest.raises(LlavaError, match=fault):
            boxes.write(box, (100, 50))
    # Published boxes reach beyond their pictures by rounding.
    assert boxes.write((-0.5, 0, 100.9, 50.9), (100, 50)) == "[0.0, 0.25, 1.0, 0.75]"
    square = Boxes("pixel", ImageSpec(336, "square"))
    assert square.write((0, 0, 60, 50), (100, 50)) == "[25, 0, 60, 50]"  # the crop is 25 to 75
    with pytest.raises(LlavaError, match="cut away: image_mode 'square' shows only the middle"):
        square.write((0, 0, 20, 50), (100, 50))
    with pytest.raises(LlavaError, match="unknown box convention 'yolo': choose one of llava, "):
        Boxes("yolo")


def test_boxes_are_drawn_where_they_are():
    image = Image.new("RGB", (200, 100))
    drawn = draw_boxes(image, [(150, 50, 50, 10)], "lime")  # corners in any order
    assert drawn.getpixel((50, 30)) == drawn.getpixel((100, 10)) == (0, 255, 0)
    assert drawn.getpixel((100, 30)) == image.getpixel((50, 30)) == (0, 0, 0)


def test_the_forms_of_numbers():
    read = lambda text: Boxes("pixel").read(text, (4, 4))
    assert read("[1., .5,0.25 , -3.0]") == [(1.0, 0.5, 0.25, -3.0)]
    assert read("[ 01,2\n,  3 ,4.50 ] [1,2,3,4]") == [(1, 2, 3, 4.5), (1, 2, 3, 4)]
    for numbers in ("1, 2, 3", "1, 2, 3, .", "1, 2, 3, 4.5.6", "+1, 2, 3, 4", "1e2, 2, 3, 4"):
        assert read(f"[{numbers}]") == []
