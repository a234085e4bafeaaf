"""GRIT, the captions with boxes of Kosmos-2 (https://huggingface.co/datasets/zzliang/GRIT).

The published rows are addresses; img2dataset fetches them and writes for each picture KEY.jpg a
KEY.json with the row's columns. One file of JSON lines of such rows is read as well.
"""

import json
from pathlib import Path

from llava_jax.data.importers.annotations import DESCRIBE, Cuts, plain, record
from llava_jax.data.published import each, read_json, readable
from llava_jax.data.record_boxes import BOX_TOKEN
from llava_jax.errors import LlavaError


def records(root: Path, split: str, cuts: Cuts) -> list[dict]:
    """A record for each caption: "A dog <box> in a field <box>"."""
    made = []
    files = sorted(p for p in root.rglob("*") if p.suffix in (".json", ".jsonl"))
    for path in files:
        if path.name.endswith("_stats.json"):  # of img2dataset
            continue
        where = path.parent.relative_to(root)
        made += each(_rows(path), path, lambda row, where=where: _record(row, where, cuts))
    if not files:
        raise LlavaError(f"{root} holds no .json or .jsonl file of GRIT's rows")
    return [one for one in made if one]


def _rows(path: Path) -> list[dict]:
    if path.suffix == ".json":
        value = read_json(path)
        return value if isinstance(value, list) else [value]
    with readable(path):
        lines = path.read_text(encoding="utf-8-sig").split("\n")
        return [json.loads(line) for line in lines if line.strip()]


def _record(row: dict, where: Path, cuts: Cuts) -> dict | None:
    caption, (width, height) = row["caption"], (row["width"], row["height"])
    chunks, boxes, places = row["noun_chunks"], [], []
    chunks = json.loads(chunks) if isinstance(chunks, str) else chunks
    # Each is [start, end of the phrase, left, top, right, bottom in shares, score].
    for start, end, left, top, right, bottom, *_ in sorted(chunks):
        if not 0 <= start < end <= len(caption):
            raise LlavaError(f"the phrase {start}:{end} is outside its caption")
        sides = (right - left) * width, (bottom - top) * height
        if box := cuts.inside((left * width, top * height, *sides), width, height):
            places.append(int(end))
            boxes.append(box)
    pieces, last = [], 0
    for end in places:
        pieces += [plain(caption[last:end]), BOX_TOKEN]
        last = max(last, end)
    text = " ".join(filter(None, [*pieces, plain(caption[last:])]))
    key = str(row["key"])
    image = (where / f"{key}.jpg").as_posix()
    return record(f"grit-{key}", image, [(DESCRIBE, text)], boxes) if boxes else None
