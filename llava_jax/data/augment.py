"""Pictures of training data flipped and cropped at random, their boxes with them. Off by default.

What is drawn for a picture is a pure function of (seed, row of the run, place in the row), so a run
that is resumed sees the same pictures.
"""

import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageOps

from llava_jax.data.boxes import Box
from llava_jax.data.parsing import Record
from llava_jax.data.record_boxes import RecordBox

# Words that are wrong of a mirrored picture.
_SIDES = re.compile(r"\b(left|right)", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """What may happen to a picture.

    Attributes:
      flip: the share of pictures that are mirrored, left for right. A record whose text speaks of
        left or right keeps its pictures as they are. Letters in a mirrored picture are mirrored.
      crop: the largest share of a side that is cut away. No box is ever cut.
      seed: of what is drawn.
    """

    flip: float = 0.0
    crop: float = 0.0
    seed: int = 0

    def __bool__(self) -> bool:
        return self.flip > 0 or self.crop > 0

    def __call__(
        self, record: Record, images: Sequence[Image.Image], row: int, place: int
    ) -> Record:
        """The record with its pictures, changed, in place of their files.

        Args:
          images: all of the record's, in their order.
          row: number of the row in the run. place: of the record in the row.
        """
        rng = np.random.default_rng([self.seed, row, place])
        texts = [turn.text for turn in record.turns] + [record.rejected or ""]
        may_flip = not any(map(_SIDES.search, texts))
        changed, boxes = [], list(record.boxes)
        for number, image in enumerate(images):
            of = [i for i, box in enumerate(boxes) if box.image == number]
            moved = [boxes[i].pixels(image.size) for i in of]
            image, moved = self._cropped(image, moved, rng)
            if rng.random() < self.flip and may_flip:
                image = ImageOps.mirror(image)
                width = image.width
                moved = [(width - x2, y1, width - x1, y2) for x1, y1, x2, y2 in moved]
            for i, box in zip(of, moved, strict=True):
                boxes[i] = RecordBox(box, "xyxy_pixel", number)
            changed.append(image)
        return dataclasses.replace(record, images=tuple(changed), boxes=tuple(boxes))

    def _cropped(
        self, image: Image.Image, boxes: list[Box], rng: np.random.Generator
    ) -> tuple[Image.Image, list[Box]]:
        """A random part of an image that holds all of the boxes, which are moved with it."""
        edges = []
        for axis, side in enumerate(image.size):
            away = int(rng.uniform(0, self.crop) * side)
            low = int(rng.integers(away + 1))
            high = side - (away - low)
            for box in boxes:
                low = min(low, max(math.floor(box[axis]), 0))
                high = max(high, min(math.ceil(box[axis + 2]), side))
            edges.append((low, high))
        (left, right), (top, bottom) = edges
        if (left, top, right, bottom) != (0, 0, *image.size):
            image = image.crop((left, top, right, bottom))
        return image, [(x1 - left, y1 - top, x2 - left, y2 - top) for x1, y1, x2, y2 in boxes]


UNCHANGED = Augmentation()
