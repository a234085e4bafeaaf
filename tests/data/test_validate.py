import dataclasses
import json
import random
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from llava_jax.data import validate
from llava_jax.data.build import build_data_set
from llava_jax.data.fingerprints import Decoder
from llava_jax.data.media import MAX_PIXELS
from llava_jax.data.pipeline import TrainingData
from llava_jax.data.records import open_records
from llava_jax.data.rows import RowFormat
from llava_jax.errors import LlavaError
from llava_jax.models.images import ImageSpec
from llava_jax.text.templates import get_template
from tests.data.conftest import record

FORMAT = RowFormat(get_template("chatml"), ImageSpec(28, "pad"), 4, max_length=96, tiles=2)


def test_a_built_set(data_set, tmp_path):
    path, root = data_set
    (root / "a/10.png").write_bytes((root / "a/10.png").read_bytes()[:-50])
    records = open_records(build_data_set(path, root, tmp_path, "shapes", progress=False))
    report = validate.validate(records, FORMAT, progress=False)
    assert list(report.faults) == ["unreadable image"]
    assert "record 10 (id 'r10'): image 'a/10.png'" in report.faults["unreadable image"][0]


TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "blue"}]
LONG = {"from": "gpt", "value": "so " * 200}


BOXED = {
    "conversations": [TURNS[0], {"from": "gpt", "value": "at <box>"}],
    "boxes": [[1, 1, 9, 9]],
    "box_format": "xyxy_pixel",
}


def picture(folder, name, size, damage=None):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(folder / name)
    data = (folder / name).read_bytes()
    if damage == "end":
        (folder / name).write_bytes(data[:-50])
    if damage == "middle":
        (folder / name).write_bytes(data[:200] + bytes(400) + data[600:])


# What may be wrong with a record, or only unusual: changes of a sound one.
CHANGES = [
    {},
    {"conversations": []},
    {"conversations": None, "messages": TURNS},
    {"conversations": [TURNS[1], TURNS[0]]},
    {"conversations": [*TURNS, TURNS[0]]},
    {"conversations": [TURNS[0], {"from": "robot", "value": "x"}]},
    {"conversations": [TURNS[0], {"from": "gpt", "value": 3}]},
    {"conversations": [TURNS[0], {"from": "gpt", "value": "<image>"}]},
    {"conversations": [{"from": "human", "value": "What?"}, TURNS[1]]},
    {"conversations": [{"from": "human", "value": "What?"}, TURNS[1]], "image": None},
    {"conversations": [*TURNS, {"from": "human", "value": "and?"}, TURNS[1]]},
    {"conversations": [{"from": "human", "value": "What?"}, TURNS[1], *TURNS]},
    {"conversations": [TURNS[0], LONG]},
    {"conversations": [{"from": "human", "value": "<image>\n" + "why " * 200}, TURNS[1]]},
    {"conversations": [{"from": "human", "value": "why " * 200 + "<image><image>"}, TURNS[1]],
     "image": ["good.png", "good.png"]},
    {"conversations": [{"from": "human", "value": "<image>" * 3}, TURNS[1]],
     "image": ["good.png"] * 3},
    {"conversations": [{"from": "system", "value": "Be brief."}, *TURNS]},
    {"system": "Be brief."},
    {"system": "Be <unk>."},
    {"conversations": [{"from": "human", "value": "<image><unk>"}, TURNS[1]]},
    {"system": "Be <image>."},
    {"image": "missing.png"},
    {"image": "../good.png"},
    {"image": "long.png"},
    {"image": "cut.png"},
    {"image": "damaged.png"},
    {"image": "text.png"},
    {"image": "large.png"},
    {"image": 3},
    {"image": None, "images": ["good.png"]},
    {"image": None, "photo": "good.png"},
    {"video": "a.mp4", "image": None},
    {"audio": "a.wav"},
    {"foo": 1, "id": "same"},
    {"image": "data:image/png;base64,AAAA"},
    BOXED,
    BOXED | {"image": "missing.png"},
    BOXED | {"image": "damaged.png"},
    BOXED | {"boxes": [[1, 1, 9000, 9]]},
    BOXED | {"boxes": [[1, 1, 9000, 9]], "image": "missing.png"},
    BOXED | {"boxes": [[9, 1, 1, 9]]},
    BOXED | {"boxes": [[0.1, 0.1, 1, 0.9]], "box_format": "xyxy_relative"},
    BOXED | {"box_format": None},
    BOXED | {"conversations": TURNS},
    {"conversations": BOXED["conversations"]},
    {"boxes": [[1, 1, 9, 9]]},
]  # fmt: skip


@pytest.mark.parametrize("seed", range(8))
def test_validate_refuses_what_training_refuses_and_nothing_else(tmp_path, tokenizers, seed):
    for name, size, damage in (
        ("good.png", (30, 20), None), ("long.png", (20_000, 1), None),
        ("cut.png", (30, 20), "end"), ("damaged.png", (60, 40), "middle"),
        ("large.png", (150, 100), None),
    ):  # fmt: skip
        picture(tmp_path, name, size, damage)
    (tmp_path / "text.png").write_text("<html>")
    choose, unk = random.Random(seed), tokenizers["smollm"].convert_tokens_to_ids("<unk>")
    outcomes = set()
    for trial in range(24):
        changes = [
            choose.choice([{}, choose.choice(CHANGES)]) for _ in range(choose.choice([1, 2, 3]))
        ]
        items = [
            {"id": i, "image": "good.png", "conversations": TURNS} | change
            for i, change in enumerate(changes)
        ]
        path = tmp_path / f"{trial}.json"
        path.write_text(json.dumps(items))
        row_format = dataclasses.replace(
            FORMAT,
            template=get_template(choose.choice(["chatml", "mistral_instruct", "plain"])),
            turns=choose.choice(["conversation", "independent"]),
            packing=choose.choice([True, False]),
            image_token_id=choose.choice([-200, unk]),
        )
        options = {"batch_size": choose.choice([1, 1, 2]), "epochs": 1, "max_pixels": 10_000}
        options |= choose.choice(
            [{}, {"bad_image": "skip"}, {"bad_image": "skip", "bad_image_ceiling": 1}]
        )
        refused, left_out = False, 0
        try:
            data = TrainingData(
                open_records(path), tokenizers["smollm"], row_format, progress=False, **options
            )
            left_out = sum(map(len, data.refused.values()))
            left_out += sum(len(batch.skipped) for batch in data.batch_iterator())
        except LlavaError:
            refused = True
        report = validate.validate(
            open_records(path), row_format, tokenizers["smollm"], threads=2, progress=False,
            **options,
        )  # fmt: skip
        assert bool(report.faults) == refused, (changes, options, row_format, report.text())
        if not refused:
            notes = [n for kind, n in report.notes.items() if kind.startswith("left out")]
            assert sum(map(len, notes)) == left_out, (changes, report.text())
        outcomes.add(refused)
    assert outcomes == {True, False}


def test_a_record_too_long_or_with_too_many_images_is_noted(tmp_path, tokenizers):
    picture(tmp_path, "good.png", (30, 20))
    sound = {"image": "good.png", "conversations": TURNS}
    three = record("c", "<image>" * 3, image=["good.png"] * 3)
    items = [sound, sound | {"conversations": [TURNS[0], LONG]}, three]
    items.append(sound | {"conversations": [{**TURNS[0], "value": "<image>" + "a " * 99}, LONG]})
    (tmp_path / "d.json").write_text(json.dumps(items))
    records = open_records(tmp_path / "d.json")
    report = validate.validate(records, FORMAT, tokenizers["smollm"], progress=False)
    assert not report.faults
    assert {kind: len(messages) for kind, messages in report.notes.items()} == {
        "cut when training at max_length=96": 1,
        "left out when training: no supervised token is left at max_length=96": 1,
        "left out when training: more images than images_per_row=2": 1,
    }
    assert len(report.lengths) == 4 and max(report.lengths) > 96


def test_little_is_kept_of_a_picture_that_was_decoded(tmp_path):
    """Two thousand names of one file, about as long as COCO's."""
    names = [f"{number:0100}.png" for number in range(2000)]
    Image.new("RGB", (4, 4)).save(tmp_path / "picture.png")
    for name in names:
        (tmp_path / name).symlink_to("picture.png")
    items = [record(str(number), image=name) for number, name in enumerate(names)]
    (tmp_path / "data.json").write_text(json.dumps(items))
    decoder = Decoder(open_records(tmp_path / "data.json"), MAX_PIXELS, collects=False)
    decoded = [decoder(0).error]  # which imports what it takes to decode
    tracemalloc.start()
    try:
        decoded += [decoder(number).error for number in range(1, len(items))]
        used = tracemalloc.get_traced_memory()[0] / len(items)
    finally:
        tracemalloc.stop()
    assert not any(decoded) and decoder.total == len(items)
    assert used < 150  # bytes: fewer than its path has
