"""What the importers have in common: questions about boxes, and boxes that leave their pictures."""

import dataclasses
from collections.abc import Sequence

from llava_jax.data.record_boxes import BOX_TOKEN

IMAGE = "<image>\n"
# The two questions of LLaVA-1.5's training data.
WHERE = "Please provide the bounding box coordinate of the region this sentence describes: {}"
WHAT = f"Please provide a short description for this region: {BOX_TOKEN}"
DESCRIBE = "Describe the picture, with the bounding box coordinates of what you mention."
REGIONS = 10  # of a conversation; a picture with more has several

Box = list[float]  # left, top, right, bottom in pixels


@dataclasses.dataclass
class Cuts:
    """How many published boxes reached beyond their pictures, and how many had no area there."""

    cut: int = 0
    left_out: int = 0

    def inside(self, xywh: Sequence[float], width: float, height: float) -> Box | None:
        """left, top, right, bottom of what is inside the picture; None without an area."""
        x, y, w, h = map(float, xywh)
        whole = [x, y, x + w, y + h]
        box = [max(x, 0.0), max(y, 0.0), min(x + w, width), min(y + h, height)]
        if not (box[0] < box[2] and box[1] < box[3]):
            self.left_out += 1
            return None
        self.cut += box != whole
        return [round(value, 4) for value in box]

    def text(self) -> str:
        parts = [f"{self.cut:,} cut at the edge of their pictures"] if self.cut else []
        parts += [f"{self.left_out:,} without an area left out"] if self.left_out else []
        return f" ({', '.join(parts)})" if parts else ""


def plain(text: str) -> str:
    """A published text in a record, where <image> and <box> would have a meaning."""
    if not isinstance(text, str):
        raise TypeError(f"expected a text, found {text!r:.80}")
    return " ".join(text.replace(BOX_TOKEN, " ").replace(IMAGE.strip(), " ").split())


def record(key: str, image: str, turns: Sequence[tuple[str, str]], boxes: Sequence[Box]) -> dict:
    """A record of (question, answer) pairs; the picture stands before the first."""
    conversation = []
    for i, (question, answer) in enumerate(turns):
        conversation.append({"from": "human", "value": ("" if i else IMAGE) + question})
        conversation.append({"from": "gpt", "value": answer})
    return {
        "id": key,
        "image": image,
        "boxes": list(boxes),
        "box_format": "xyxy_pixel",
        "conversations": conversation,
    }


def about_regions(key: str, image: str, regions: Sequence[tuple[str, Box]]) -> list[dict]:
    """Conversations about (sentence, box) pairs: where is it, and what is there, in turns."""
    records = []
    for start in range(0, len(regions), REGIONS):
        part = regions[start : start + REGIONS]
        turns = [
            (WHAT, sentence) if i % 2 else (WHERE.format(sentence), BOX_TOKEN)
            for i, (sentence, _) in enumerate(part)
        ]
        name = key if len(regions) <= REGIONS else f"{key}-{start // REGIONS}"
        records.append(record(name, image, turns, [box for _, box in part]))
    return records
