"""Boxes in answers of LLaVA-1.5: [x1, y1, x2, y2] from 0 to 1 on the picture padded to a square."""

import re
from collections.abc import Sequence

from PIL import Image, ImageDraw

Box = tuple[float, float, float, float]  # left, top, right, bottom

_NUMBER = r"\s*(-?(?:\d+\.?\d*|\.\d+))\s*"
_BOX = re.compile(rf"\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]")


def parse_boxes(text: str) -> list[Box]:
    """The boxes written in a text, in their order."""
    return [tuple(map(float, match)) for match in _BOX.findall(text)]


def to_pixels(box: Box, size: tuple[int, int]) -> Box:
    """A box on the padded square in pixels of the picture, (width, height), at its centre."""
    width, height = size
    side = max(size)
    left, top = (side - width) // 2, (side - height) // 2
    x1, y1, x2, y2 = (side * value for value in box)
    return x1 - left, y1 - top, x2 - left, y2 - top


def draw_boxes(image: Image.Image, boxes: Sequence[Box], colour: str) -> Image.Image:
    """A copy of the picture with boxes, in pixels, drawn on it; corners may be in any order."""
    image = image.copy()
    pen = ImageDraw.Draw(image)
    for x1, y1, x2, y2 in boxes:
        corners = (min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2))
        pen.rectangle(corners, outline=colour, width=max(2, max(image.size) // 150))
    return image
