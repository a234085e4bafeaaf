r"""The boxes of a record: its keys, and the places of boxes in its text.

    {"id": "7", "image": "cats/7.jpg", "boxes": [[12, 30, 200, 180]], "box_format": "xyxy_pixel",
     "conversations": [{"from": "human", "value": "<image>\nWhere is the cat?"},
                       {"from": "gpt", "value": "It is at <box>."}]}

The first `<box>` stands for the first of `boxes`, and so on; it becomes the text in which the model
writes that box. `box_format` says how they are given. Of a record with several pictures
`box_images` has the number of each box's picture, from 0. A record without `boxes` may hold
`<box>` as text.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llava_jax.data.boxes import Box, Boxes, shown
from llava_jax.errors import LlavaError, RecordError, brief
from llava_jax.text.conversation import Turn

BOX_TOKEN = "<box>"
BOX_KEYS = ("boxes", "box_format", "box_images")
BOX_FORMATS = ("xyxy_pixel", "xyxy_relative", "xywh_pixel", "xywh_relative")


@dataclass(frozen=True)
class RecordBox:
    """One box as a record gives it.

    Attributes:
      values: left, top, and then right, bottom (xyxy) or width, height (xywh).
      format: one of BOX_FORMATS: in pixels of the upright picture, or in shares of its sides.
      image: number of its picture.
    """

    values: tuple[float, float, float, float]
    format: str
    image: int = 0

    def pixels(self, size: Sequence[int]) -> Box:
        """In pixels of its picture, whose (width, height) is `size`."""
        left, top, right, bottom = self.values
        if self.format.startswith("xywh"):
            right, bottom = left + right, top + bottom
        if self.format.endswith("pixel"):
            return left, top, right, bottom
        return left * size[0], top * size[1], right * size[0], bottom * size[1]


def has_boxes(item: dict) -> bool:
    """Whether boxes of a decoded record are read: their format is declared, or its text has some.

    Other programs have `boxes` of their own in records: a key that nothing reads.
    """
    if not item.get("boxes") or "box_format" in item:
        return "box_format" in item
    turns = item.get("conversations")
    turns = turns if isinstance(turns, list) else []
    texts = [turn.get("value") for turn in turns if isinstance(turn, dict)]
    return any(isinstance(text, str) and BOX_TOKEN in text for text in texts)


def parse_boxes(item: dict, turns: Sequence[Turn], images: int, where: str) -> tuple:
    """The RecordBoxes of a decoded record.

    Args:
      images: how many pictures it has.
      where: what errors call it.

    Raises:
      RecordError: they are not what the top of this module says, or are not as many as `<box>`.
    """
    if not has_boxes(item):
        return ()
    fault = lambda text: RecordError("bad box", f"{where}{text}")
    boxes, declared = item.get("boxes"), item.get("box_format")
    if declared not in BOX_FORMATS:
        raise fault(
            f" has boxes and box_format {brief(declared)}: declare one of {', '.join(BOX_FORMATS)}"
        )
    if not isinstance(boxes, list) or not all(map(_is_box, boxes)):
        culprit = boxes
        if isinstance(boxes, list):
            culprit = next(box for box in boxes if not _is_box(box))
        raise fault(f": 'boxes' must be a list of lists of four numbers, not {brief(culprit)}")
    places = sum(turn.text.count(BOX_TOKEN) for turn in turns)
    if places != len(boxes):
        raise fault(f" has {places} {BOX_TOKEN} in its text but {len(boxes)} boxes")
    of = item.get("box_images")
    if of is None and images == 1:
        of = [0] * len(boxes)
    is_image = lambda value: type(value) is int and 0 <= value < images
    if not isinstance(of, list) or len(of) != len(boxes) or not all(map(is_image, of)):
        raise fault(
            f" has {images} images: 'box_images' must be a list with the number of the image of "
            f"each box, from 0, not {brief(of)}"
        )
    found = []
    for number, (values, image) in enumerate(zip(boxes, of, strict=True)):
        box = RecordBox(tuple(map(float, values)), declared, image)
        _check_form(box, lambda text, number=number: fault(f", box {number}: {text}"))
        found.append(box)
    return tuple(found)


def as_json(boxes: Sequence[RecordBox]) -> dict:
    """The inverse of `parse_boxes`: the keys of a record with these boxes, none without any."""
    if not boxes:
        return {}
    return {
        "boxes": [list(box.values) for box in boxes],
        "box_format": boxes[0].format,
        "box_images": [box.image for box in boxes],
    }


def _is_box(values) -> bool:
    is_number = lambda value: isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(values, list) and len(values) == 4 and all(map(is_number, values))


def _check_form(box: RecordBox, fault) -> None:
    """What can be said of a box without the size of its picture."""
    if not all(map(math.isfinite, box.values)):
        raise fault(f"{shown(box.values)} is not finite")
    left, top, right, bottom = box.pixels((1, 1))
    if left >= right or top >= bottom:
        meant = "width and height must be more than 0"
        if box.format.startswith("xyxy"):
            meant = "left must be less than right, top less than bottom"
        raise fault(f"{shown(box.values)} has no area as {box.format}: {meant}")


def nominal_size(side: int, boxes: Sequence[RecordBox], image: int) -> tuple[int, int]:
    """A (width, height) to take for an image that cannot be read: at least `side`, and all its
    boxes are inside."""
    edges = [box.pixels((1, 1))[2:] for box in boxes if box.image == image]
    width, height = (max(side, *map(math.ceil, ends)) for ends in zip((0, 0), *edges, strict=True))
    return width, height


def box_texts(
    boxes: Sequence[RecordBox], sizes: Sequence[Sequence[int]], writing: Boxes
) -> list[str]:
    """Each box of a record as the model writes it.

    Args:
      sizes: (width, height) of each image of the record, (width, height, frames) of a video.

    Raises:
      RecordError: a box is outside its picture or what is shown of it, or is one of a video.
    """
    several, texts = sum(len(size) == 2 for size in sizes) > 1, []
    for number, box in enumerate(boxes):
        size = sizes[box.image]
        try:
            if len(size) > 2:
                raise LlavaError("boxes of videos are not read: give the frame as an image")
            texts.append(writing.write(box.pixels(size), size, several))
        except LlavaError as error:
            raise RecordError("bad box", f"box {number}: {error}") from None
    return texts


def placed_boxes(
    turns: Sequence[Turn],
    boxes: Sequence[RecordBox],
    sizes: Sequence[Sequence[int]],
    writing: Boxes,
) -> Sequence[Turn]:
    """The turns of a record with each `<box>` as the model writes it; see `box_texts`."""
    if not boxes:
        return turns
    waiting, placed = iter(box_texts(boxes, sizes, writing)), []
    for turn in turns:
        first, *rest = turn.text.split(BOX_TOKEN)
        pieces = [next(waiting) + piece for piece in rest]
        placed.append(Turn(turn.role, "".join([first, *pieces])))
    return placed
