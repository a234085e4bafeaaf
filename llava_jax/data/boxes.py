"""Boxes of pictures: how a model writes them, and what it has written in pixels of the picture.

A box is (left, top, right, bottom) in pixels of the original, upright picture; where the picture is
cut, padded or squashed for the model is the business of this module alone. A *convention* says what
a coordinate is a share of, and how it is written. Its *frame* is a rectangle of the picture's
pixels:

    +-----------+    `square`: the square that the model is shown, with its padding (LLaVA-1.5).
    |  padding  |        Of image_mode `square` the crop, of `resize` the whole picture. AnyRes
    +-----------+        shows several views; its checkpoints learnt boxes on the padded square.
    |  picture  |    `seen`: what the model is shown of the picture, without padding.
    +-----------+    `picture`: all of the picture.
    |  padding  |
    +-----------+    Of a box that a crop cuts through the part inside is written; one that it cuts
                     away is refused.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from llava_jax.errors import LlavaError
from llava_jax.models.images import ImageSpec, Size, box_view

Box = tuple[float, float, float, float]  # left, top, right, bottom

BINS = 32  # location tokens of Kosmos-2 along a side
OVERHANG = 1.0  # pixels that published boxes may reach beyond a picture
# Digits are read one way alone: a pattern that may split them anywhere takes quadratic time.
_NUMBER = r"\s*(-?(?:\d+(?:\.\d*)?|\.\d+))\s*"
_CORNERS = re.compile(rf"\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]")
_TOKENS = re.compile(r"<patch_index_(\d{4})><patch_index_(\d{4})>")


@dataclass(frozen=True)
class Convention:
    """One way to write a box.

    Attributes:
      frame: `square`, `seen` or `picture`: what coordinates are shares of, see above.
      write: (shares of the frame, size of the frame) -> text.
      pattern: finds a box in a text.
      read: (groups of a match, size of the frame) -> shares of the frame.
    """

    frame: str
    write: Callable[[Box, tuple[float, float]], str]
    pattern: re.Pattern
    read: Callable[[Sequence[str], tuple[float, float]], Box]


def _scaled(scale: float, digits: int | None, frame: str) -> Convention:
    """[x1, y1, x2, y2] from 0 to `scale`."""
    return Convention(
        frame,
        lambda box, size: str([round(scale * value, digits) for value in box]),
        _CORNERS,
        lambda groups, size: tuple(float(value) / scale for value in groups),
    )


def _write_pixels(box: Box, size: tuple[float, float]) -> str:
    return str([round(value * side) for value, side in zip(box, size * 2, strict=True)])


def _read_pixels(groups: Sequence[str], size: tuple[float, float]) -> Box:
    return tuple(float(value) / side for value, side in zip(groups, size * 2, strict=True))


def _write_tokens(box: Box, size: tuple[float, float]) -> str:
    """The bins of the upper left and the lower right corner, counted row by row."""
    left, top = (min(math.floor(value * BINS), BINS - 1) for value in box[:2])
    right, bottom = (math.ceil(value * BINS) - 1 for value in box[2:])
    first, last = top * BINS + left, max(bottom, top) * BINS + max(right, left)
    return f"<object><patch_index_{first:04d}><patch_index_{last:04d}></object>"


def _read_tokens(groups: Sequence[str], size: tuple[float, float]) -> Box:
    """Centres of the two bins; of bins in one row or column their outer edges."""
    (top, left), (bottom, right) = (divmod(int(index), BINS) for index in groups)
    inset = 0.0 if left == right or top == bottom else 0.5
    box = left + inset, top + inset, right + 1 - inset, bottom + 1 - inset
    return tuple(value / BINS for value in box)


CONVENTIONS: dict[str, Convention] = {
    # LLaVA-1.5: two decimals, without zeros at their end: [0.25, 0.5, 0.75, 1.0]
    "llava": _scaled(1, 2, "square"),
    # Qwen-VL and others: thousandths of what is seen of the picture: [250, 500, 750, 1000]
    "qwen_1000": _scaled(1000, None, "seen"),
    # Kosmos-2: 32 x 32 bins: <object><patch_index_0520><patch_index_1015></object>
    "kosmos": Convention("seen", _write_tokens, _TOKENS, _read_tokens),
    # whole pixels of the picture: [160, 240, 480, 479]
    "pixel": Convention("picture", _write_pixels, _CORNERS, _read_pixels),
}


@dataclass(frozen=True)
class Boxes:
    """The boxes of one model, in and out.

    >>> Boxes("llava", ImageSpec(mode="pad")).write((50, 0, 150, 50), (200, 100))
    '[0.25, 0.25, 0.75, 0.5]'

    Attributes:
      convention: a key of `CONVENTIONS`.
      image: how its pictures are prepared.
    """

    convention: str = "llava"
    image: ImageSpec = ImageSpec()

    def __post_init__(self):
        check_convention(self.convention)

    def frame(self, size: Size, several: bool = False) -> Box:
        """The rectangle that coordinates are shares of, in pixels of a picture of `size`.

        several: it is one of several pictures of a prompt.
        """
        kind = CONVENTIONS[self.convention].frame
        if kind == "picture":
            return (0.0, 0.0, *map(float, size))
        if kind == "seen":
            return self._seen(size, several)
        return _square(self.image, size, several)

    def _seen(self, size: Size, several: bool) -> Box:
        return _overlap(_square(self.image, size, several), (0.0, 0.0, *size))

    def write(self, box: Box, size: Size, several: bool = False) -> str:
        """A box in pixels of a picture as the model writes it.

        Raises:
          LlavaError: it is not finite, has no area, or is outside the picture or of what the
            model is shown of it.
        """
        check_box(box, size)
        kept = _overlap(box, self._seen(size, several))
        if not _has_area(kept):
            raise LlavaError(
                f"{shown(box)} is cut away: image_mode {self.image.mode!r} shows only the middle "
                f"of a picture of {size[0]}x{size[1]} pixels; take pad, or leave the box out"
            )
        left, top, right, bottom = self.frame(size, several)
        sides = right - left, bottom - top
        shares = [
            float((value - origin) / side)
            for value, origin, side in zip(kept, (left, top) * 2, sides * 2, strict=True)
        ]
        return CONVENTIONS[self.convention].write(tuple(shares), sides)

    def read(self, text: str, size: Size, several: bool = False) -> list[Box]:
        """The boxes in a text in pixels of the picture, in their order and as they are written.

        What a model writes may have swapped corners, or be outside the picture.
        """
        convention = CONVENTIONS[self.convention]
        left, top, right, bottom = self.frame(size, several)
        sides = right - left, bottom - top
        found = [convention.read(match, sides) for match in convention.pattern.findall(text)]
        return [
            (left + x1 * sides[0], top + y1 * sides[1], left + x2 * sides[0], top + y2 * sides[1])
            for x1, y1, x2, y2 in found
        ]

    def drawable(self, text: str, size: Size, several: bool = False) -> list[Box]:
        """Those boxes of `read` that have an area on the picture, cut to it."""
        cut = [_overlap(box, (0.0, 0.0, *size)) for box in self.read(text, size, several)]
        return [box for box in cut if _has_area(box)]


def check_convention(name: str) -> None:
    """Raises LlavaError if there is no such convention."""
    if name not in CONVENTIONS:
        known = ", ".join(CONVENTIONS)
        raise LlavaError(f"unknown box convention {name!r}: choose one of {known}")


def check_box(box: Box, size: Size) -> None:
    """Raises LlavaError unless a box has an area on a picture; see OVERHANG."""
    if not all(map(math.isfinite, box)):
        raise LlavaError(f"{shown(box)} is not finite")
    if not _has_area(box):
        raise LlavaError(
            f"{shown(box)} has no area: left must be less than right, top less than bottom"
        )
    beyond = max(-box[0], -box[1], box[2] - size[0], box[3] - size[1])
    if beyond > OVERHANG or not _has_area(_overlap(box, (0.0, 0.0, *size))):
        raise LlavaError(f"{shown(box)} is outside the picture of {size[0]}x{size[1]} pixels")


def shown(box: Sequence[float]) -> str:
    """A box for people: [12.5, 3, 40, 60]."""
    return f"[{', '.join(f'{value:.6g}' for value in box)}]"


def _square(spec: ImageSpec, size: Size, several: bool) -> Box:
    """The square that a picture is shown on, in pixels of the picture."""
    view = box_view(spec, size, several)
    (left, across), (top, down) = view.on_picture(size)
    return left, top, left + view.cut[0] * across, top + view.cut[1] * down


def _has_area(box: Box) -> bool:
    return box[0] < box[2] and box[1] < box[3]


def _overlap(a: Box, b: Sequence[float]) -> Box:
    return max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])


def draw_boxes(image: Image.Image, boxes: Sequence[Box], colour: str) -> Image.Image:
    """A copy of the picture with boxes, in pixels, drawn on it; corners may be in any order."""
    image = image.copy()
    pen = ImageDraw.Draw(image)
    for x1, y1, x2, y2 in boxes:
        corners = (min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2))
        pen.rectangle(corners, outline=colour, width=max(2, max(image.size) // 150))
    return image
