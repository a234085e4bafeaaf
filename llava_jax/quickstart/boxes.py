"""Where is the shape, and what is at this box? Records with boxes from easy-VQA's pictures.

A box is measured from the pixels: all that is not the background. A mosaic has two to four pictures
of different shapes in the quarters of a square, so a question names the one that is meant. To them
comes a part of the old conversations: what was learnt before is not to be lost.
"""

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from llava_jax.files import write_records
from llava_jax.quickstart import composed, easy_vqa
from llava_jax.quickstart.commands import ROOT
from llava_jax.quickstart.composed import SIDE, Shape, box_of, read_shapes
from llava_jax.quickstart.easy_vqa import conversation
from llava_jax.quickstart.folders import is_written, written_folder

SOURCES = [__file__, composed.__file__, easy_vqa.__file__]
SINGLES, MOSAICS, OLD = 3000, 2000, 600  # records to train on
TEST, HELD_OUT = 400, 20  # of each kind
BACKGROUND = 24  # levels, summed over the channels, that a pixel of a shape differs by


class Example(NamedTuple):
    """A picture with its shapes and their boxes in pixels: left, top, right, bottom.

    file: the picture's name below the quickstart's folder.
    """

    file: str
    shapes: list[Shape]
    boxes: list[tuple[int, int, int, int]]


def prepare_boxes(root: str | Path, log: Callable[[str], None] = print) -> Path:
    """Writes the data set to root/boxes, unless it is there, complete and unchanged.

    Files, whose image paths start at `root`, where `easy_vqa` must be:
      train.json: conversations about single pictures and mosaics, and old ones of easy-VQA.
      val.json: the same of other pictures.
      test.json: one question a record about pictures of the test split, with keys question, answer
        and kind: `where` and `what` of single pictures, `where, mosaic` and `what, mosaic`.
      images/: the mosaics.
    """
    root = Path(root)
    out_dir = root / "boxes"
    if is_written(out_dir, SOURCES, log):
        return out_dir
    log(f"boxes: writing {out_dir} ...")
    shapes = read_shapes("train")
    random.Random("held out").shuffle(shapes)
    with written_folder(out_dir, SOURCES) as temporary:
        parts = {
            "train": (shapes[HELD_OUT:], SINGLES, MOSAICS),
            "val": (shapes[:HELD_OUT], HELD_OUT, HELD_OUT),
            "test": (read_shapes("test"), TEST, TEST),
        }
        for split, (own, singles, mosaics) in parts.items():
            rng = random.Random(f"boxes {split}")
            examples = [_single(rng.choice(own)) for _ in range(singles)]
            for i in range(mosaics):
                name = f"images/{split}-{i}.png"
                picture, example = _mosaic(rng, own, f"boxes/{name}")
                (temporary / name).parent.mkdir(exist_ok=True)
                picture.save(temporary / name)
                examples.append(example)
            records = _tests(examples) if split == "test" else _talks(rng, examples, split)
            if split == "train":
                old = json.loads((root / "easy_vqa/instruct.json").read_text())
                used = {example.file for example in map(_single, shapes[:HELD_OUT])}
                old = [_moved(r) for r in old if f"easy_vqa/images/{r['image']}" not in used]
                records += rng.sample(old, min(OLD, len(old)))
            write_records(temporary / f"{split}.json", records)
            log(f"boxes: {len(records):,} {split} records")
    return out_dir


def _single(one: Shape) -> Example:
    return Example(f"easy_vqa/images/{one.file}", [one], [box_of(one.picture, BACKGROUND)])


def _mosaic(rng: random.Random, shapes: Sequence[Shape], file: str) -> tuple[Image.Image, Example]:
    """Two to four pictures in the quarters of a square, no two of one colour and shape."""
    count, chosen, names = rng.randrange(2, 5), [], set()
    while len(chosen) < count:
        one = rng.choice(shapes)
        if _name(one) not in names:
            chosen.append(one)
            names.add(_name(one))
    picture = Image.new("RGB", (2 * SIDE, 2 * SIDE), chosen[0].picture.getpixel((0, 0)))
    boxes = []
    for one, quarter in zip(chosen, rng.sample(range(4), count), strict=True):
        x, y = SIDE * (quarter % 2), SIDE * (quarter // 2)
        picture.paste(one.picture, (x, y))
        left, top, right, bottom = box_of(one.picture, BACKGROUND)
        boxes.append((left + x, top + y, right + x, bottom + y))
    return picture, Example(file, chosen, boxes)


def _name(one: Shape) -> str:
    return f"{one.color} {one.shape}"


def _where(example: Example, number: int) -> tuple[str, str]:
    """Question and answer, whose `<box>` is that of the shape."""
    name = "shape" if len(example.shapes) == 1 else _name(example.shapes[number])
    return f"where is the {name}?", "<box>"


def _what(example: Example, number: int) -> tuple[str, str]:
    return "what is at <box>?", f"a {_name(example.shapes[number])}"


def _talks(rng: random.Random, examples: Sequence[Example], split: str) -> list[dict]:
    """Questions about each picture: where its shape is and what is there, three about a mosaic."""
    records = []
    for i, example in enumerate(examples):
        asked = [(ask, number) for number in range(len(example.shapes)) for ask in (_where, _what)]
        asked = rng.sample(asked, min(3, len(asked)))
        pairs = [ask(example, number) for ask, number in asked]
        records.append(_record(f"{split}-{i}", example, pairs, [number for _, number in asked]))
    return records


def _tests(examples: Sequence[Example]) -> list[dict]:
    """One question of each kind about each picture, with what a scorer needs."""
    records = []
    for i, example in enumerate(examples):
        for kind, ask in (("where", _where), ("what", _what)):
            question, answer = ask(example, 0)
            record = _record(f"test-{i}-{kind}", example, [(question, answer)], [0])
            kind += ", mosaic" if len(example.shapes) > 1 else ""
            records.append(record | {"question": question, "answer": answer, "kind": kind})
    return records


def _record(key: str, example: Example, pairs: list[tuple[str, str]], numbers: list[int]) -> dict:
    """A record; each of the pairs has the box of the shape of its number."""
    return {
        "id": key,
        "image": example.file,
        "boxes": [example.boxes[number] for number in numbers],
        "box_format": "xyxy_pixel",
        "conversations": conversation(pairs),
    }


def _moved(record: dict) -> dict:
    return record | {"image": f"easy_vqa/images/{record['image']}"}


def main() -> None:
    """Writes the data set of the quickstart: python -m llava_jax.quickstart.boxes"""
    prepare_boxes(ROOT)


if __name__ == "__main__":
    main()
