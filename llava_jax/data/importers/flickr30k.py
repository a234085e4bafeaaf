"""Flickr30k Entities (https://github.com/BryanPlummer/flickr30k_entities): phrases with boxes."""

import re
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from pathlib import Path

from llava_jax.data.importers.annotations import DESCRIBE, Cuts, plain, record
from llava_jax.data.published import each, readable
from llava_jax.data.record_boxes import BOX_TOKEN
from llava_jax.errors import LlavaError

_PHRASE = re.compile(r"\[/EN#(\d+)(?:/\w+)+ ([^\]]*)\]")


def records(root: Path, split: str, cuts: Cuts) -> list[dict]:
    """A record for each sentence with a box: "A man <box> in a blue shirt <box> ..."."""
    names = root / f"{split}.txt"
    with readable(names):
        numbers = names.read_text(encoding="utf-8").split()
    made = []
    for number in numbers:
        sentences = root / "Sentences" / f"{number}.txt"
        with readable(sentences):
            lines = sentences.read_text(encoding="utf-8").splitlines()
        boxes = _boxes(root / "Annotations" / f"{number}.xml", cuts)

        def make(pair, number=number, boxes=boxes) -> dict | None:
            index, line = pair
            text, found = _grounded(line, boxes)
            image = f"flickr30k-images/{number}.jpg"
            key = f"flickr30k-{number}-{index}"
            return record(key, image, [(DESCRIBE, text)], found) if found else None

        made += each(list(enumerate(lines)), sentences, make)
    return [one for one in made if one]


def _grounded(line: str, boxes: dict[str, list]) -> tuple[str, list]:
    """A sentence with <box> behind each phrase that has boxes, and the boxes in their order.

    "[/EN#7/people A man] runs ."  ->  "A man <box> runs ."
    """
    found, pieces, end = [], [], 0
    for match in _PHRASE.finditer(line):
        own = boxes.get(match[1], [])
        found += own
        pieces += [plain(line[end : match.start()]), plain(match[2]), *[BOX_TOKEN] * len(own)]
        end = match.end()
    pieces.append(plain(line[end:]))
    if "[/EN#" in "".join(pieces):
        raise LlavaError(f"a phrase is not marked as published: {line!r:.80}")
    return " ".join(filter(None, pieces)), found


def _boxes(path: Path, cuts: Cuts) -> dict[str, list]:
    """Number of an entity -> its boxes, from an annotation."""
    with readable(path):
        try:
            tree = ElementTree.parse(path).getroot()
        except ElementTree.ParseError as error:
            raise LlavaError(f"{path} is no annotation: {error}") from None
    boxes = defaultdict(list)

    def take(item) -> None:
        bounds = item.find("bndbox")
        if bounds is None:  # not in the picture, or the scene as a whole
            return
        edges = [float(bounds.findtext(key)) for key in ("xmin", "ymin", "xmax", "ymax")]
        left, top, right, bottom = edges
        if box := cuts.inside((left, top, right - left, bottom - top), *size):
            for name in item.findall("name"):
                boxes[name.text].append(box)

    with readable(path):
        try:
            size = [float(tree.findtext(f"size/{key}")) for key in ("width", "height")]
        except (TypeError, ValueError):
            raise LlavaError(f"{path} has no size of its picture") from None
    if objects := tree.findall("object"):
        each(objects, path, take)
    return boxes
