"""The same twelve records in each form that files of other programs have."""

import base64
import copy
import io
import json
import tarfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
from PIL import Image

from tests.tiny_model import random_image

COUNT = 12


def originals(root: Path) -> list[dict]:
    """LLaVA's own form; the pictures are files below `root`: none, one or two a record."""
    (root / "a").mkdir(parents=True, exist_ok=True)
    items = []
    for i in range(COUNT):
        names = [f"a/{i}.png"] if i % 4 else [] if i % 8 else [f"a/{i}.png", f"a/{i}b.png"]
        for number, name in enumerate(names):
            random_image(i + 100 * number).resize((20 + i, 31)).save(root / name)
        turns = [
            ("human", "<image>\n" * len(names) + f"What is {i}, 你好?"),
            ("gpt", f"It is {i}."),
        ]
        if i % 3 == 0:
            turns += [("human", "And then?"), ("gpt", "Nothing.")]
        items.append({
            "id": f"r{i}",
            "image": names or None,
            "conversations": [{"from": who, "value": text} for who, text in turns],
        })  # fmt: skip
    return items


def write_json(path: Path, items: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(items, ensure_ascii=False))
    return path


def messages(item: dict, part) -> dict:
    """The record with messages; part(name) is the part of a picture, None: marks in the texts."""
    found, names = [], iter(item["image"] or ())
    for turn in item["conversations"]:
        role = {"human": "user", "gpt": "assistant"}[turn["from"]]
        content = turn["value"]
        if part is not None:
            content = [part(next(names)) for _ in range(content.count("<image>"))]
            content.append({"type": "text", "text": turn["value"].replace("<image>\n", "")})
        found.append({"role": role, "content": content})
    item = {key: value for key, value in item.items() if key != "conversations"}
    return item | {"messages": found}


def as_address(root: Path, name: str) -> str:
    return "data:image/png;base64," + base64.b64encode((root / name).read_bytes()).decode()


def as_structs(root: Path, item: dict, with_bytes: bool = True) -> list[dict]:
    """The pictures as `datasets` stores them."""
    read = lambda name: (root / name).read_bytes() if with_bytes else None
    return [{"bytes": read(name), "path": name} for name in item["image"] or ()]


def write_parquet(path: Path, items: list[dict], group: int = 5, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.Table.from_pylist(items)
    pyarrow.parquet.write_table(table, path, row_group_size=group, **options)
    return path


def write_json_and_parquet(folder: Path) -> list[dict]:
    """The records as data.json, with images/, and as two files in parquet/, with pictures."""
    items = originals(folder / "images")
    write_json(folder / "data.json", items)
    rows = [item | {"image": as_structs(folder / "images", item)} for item in items]
    write_parquet(folder / "parquet/train-00000-of-00002.parquet", rows[:7])
    write_parquet(folder / "parquet/train-00001-of-00002.parquet", rows[7:])
    return items


def write_tar(path: Path, samples: list[tuple[str, dict[str, bytes]]]) -> Path:
    """samples: key -> {extension: content}, in their order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, members in samples:
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def in_texts(item: dict) -> dict:
    """The form of The Cauldron: pictures without marks."""
    turns = [turn["value"].replace("<image>\n", "") for turn in item["conversations"]]
    pairs = zip(turns[::2], turns[1::2], strict=True)
    item = {key: value for key, value in item.items() if key != "conversations"}
    return item | {"texts": [{"user": q, "assistant": a, "source": "x"} for q, a in pairs]}


def json_forms(folder: Path, root: Path) -> dict[str, Path]:
    """Name of a form -> its JSON file; all name their pictures below `root`."""
    items = originals(root)
    placeholder = lambda name: {"type": "image"}
    with_url = lambda name: {"type": "image_url", "image_url": {"url": as_address(root, name)}}
    without = lambda item: {key: value for key, value in item.items() if key != "image"}
    sharegpt = copy.deepcopy(items)
    for item in sharegpt:
        for turn in item["conversations"]:
            turn["from"] = {"human": "user", "gpt": "assistant"}[turn["from"]]
    forms = {
        "llava": items,
        "sharegpt": sharegpt,
        "messages": [messages(item, None) for item in items],
        "placeholders": [messages(item, placeholder) for item in items],
        "addresses": [without(messages(item, with_url)) for item in items],
        "texts": [in_texts(item) for item in items],
        "paths in parts": [
            without(messages(item, lambda name: {"type": "image", "image": name})) for item in items
        ],
    }
    return {name: write_json(folder / f"{name}.json", of) for name, of in forms.items()}


def picture(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))
