"""Random changes of pictures: boxes move with them, and a resumed run repeats them."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava_jax.data import media
from llava_jax.data.augment import Augmentation
from llava_jax.data.pipeline import TrainingData
from llava_jax.data.records import open_records
from llava_jax.data.rows import RowFormat
from llava_jax.models.images import ImageSpec
from llava_jax.text.templates import get_template
from tests.tiny_model import byte_tokenizer

SIDE, BOX = 28, [8, 10, 40, 30]


@pytest.fixture
def records(tmp_path):
    """Twelve pictures of a white rectangle on black, and where it is."""
    rng = np.random.default_rng(0)
    items = []
    for number in range(12):
        width, height = (int(side) for side in rng.integers(60, 90, 2))
        image = Image.new("RGB", (width, height))
        image.paste((255, 255, 255), tuple(BOX))
        image.save(tmp_path / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nwhere?"}, {"from": "gpt", "value": "<box>"}]
        item = {"id": str(number), "image": f"{number}.png", "conversations": turns}
        items.append(item | {"boxes": [BOX], "box_format": "xyxy_pixel"})
    path = tmp_path / "data.json"
    path.write_text(json.dumps(items))
    return open_records(path)


def edited(records, change):
    """Other records: what `change` makes of the items, or has done to them."""
    path = Path(records.path)
    items = json.loads(path.read_text())
    path.write_text(json.dumps(change(items) or items))
    return open_records(path)


def data(records, mode="resize", steps=6, max_length=300, tiles=4, **changes) -> TrainingData:
    image = ImageSpec(SIDE, mode)
    form = RowFormat(get_template("v1"), image, 4, max_length, tiles, packing=False)
    options = {"batch_size": 2, "steps": steps, "progress": False, "threads": 1}
    return TrainingData(
        records, byte_tokenizer(), form, augmentation=Augmentation(**changes), **options
    )


def arrays(data, start=0):
    return [batch.arrays for batch in data.batch_iterator(start)]


def written(row) -> list[float]:
    text = byte_tokenizer().decode(row[row >= 0])
    return [float(value) for value in text[text.index("[") + 1 : text.index("]")].split(", ")]


def white(tile) -> list[float]:
    y, x = np.nonzero(tile[..., 0] > 127)
    return [x.min() / SIDE, y.min() / SIDE, (x.max() + 1) / SIDE, (y.max() + 1) / SIDE]


@pytest.mark.parametrize("changes", [{}, {"flip": 1.0}, {"crop": 0.4}, {"flip": 0.5, "crop": 0.3}])
def test_boxes_move_with_their_pictures(records, changes):
    for batch in arrays(data(records, **changes)):
        for ids, tiles in zip(batch["input_ids"], batch["tiles"], strict=True):
            difference = np.abs(np.subtract(written(ids), white(tiles[0])))
            assert difference.max() <= 1 / SIDE + 0.006


def test_pictures_change_and_a_resumed_run_sees_the_same(records):
    plain, changed = arrays(data(records)), arrays(data(records, flip=0.5, crop=0.3))
    differ = [(a["tiles"] != b["tiles"]).any() for a, b in zip(plain, changed, strict=True)]
    assert any(differ)
    again = arrays(data(records, flip=0.5, crop=0.3), start=3)
    for a, b in zip(changed[3:], again, strict=True):
        assert all((a[name] == b[name]).all() for name in a)
    other = arrays(data(records, flip=0.5, crop=0.3, seed=1))
    assert any((a["tiles"] != b["tiles"]).any() for a, b in zip(changed, other, strict=True))


def test_a_text_about_sides_is_not_mirrored(records):
    records = edited(
        records,
        lambda items: items[0]["conversations"].__setitem__(
            0, {"from": "human", "value": "<image>\nwhat is on the Left?"}
        ),
    )
    image = Image.open(records[0].images[0])
    for number, mirrored in ((0, False), (1, True)):
        record = Augmentation(flip=1.0)(records[number], [image], 0, 0)
        assert (record.boxes[0].values != tuple(map(float, BOX))) == mirrored
        assert (record.images[0].tobytes() != image.tobytes()) == mirrored


@pytest.mark.parametrize("mode, tight", [("resize", False), ("anyres", False), ("anyres", True)])
def test_what_would_need_more_room_stays_as_it_is(records, monkeypatch, mode, tight):
    """Of a part of a picture a box may have more digits, and AnyRes may cut it into more tiles.

    If it is tight no token beyond those of the picture as it is would fit into a row.
    """
    options = {"mode": mode, "tiles": 5}
    if tight:
        records = edited(records, lambda items: items[-1:] * 2)  # 80 x 60
        options["max_length"] = data(records, **options).tokens_per_epoch // 2
    builder = data(records, crop=0.5, **options)._row_builder
    opened, open_file = [], media._open
    monkeypatch.setattr(media, "_open", lambda *given: opened.append(given) or open_file(*given))
    outcomes = {True: 0, False: 0}
    for member in range(len(records)):
        tokens, (plain,) = builder._conversation(records[member])
        assert [len(tokens), plain[0].tiles] == builder.room[member].tolist()
        for row in range(5):
            changed, (found,) = builder._changed(records[member], builder.room[member], row, 0)
            stays = found[1].tobytes() == plain[1].tobytes()
            outcomes[stays] += 1
            if stays:
                np.testing.assert_array_equal(changed.input_ids, tokens.input_ids)
            assert len(changed) <= len(tokens) and found[0].tiles <= plain[0].tiles
            assert changed.input_ids[-1] == tokens.input_ids[-1]  # the end of the answer
    assert min(outcomes.values()) > 0
    assert len(opened) == len(records) + sum(outcomes.values())  # a file once, whatever comes of it


def test_a_change_that_leaves_nothing_to_learn_is_not_made(tmp_path):
    """A part that AnyRes cuts into more tiles would push the answer out of the row."""
    Image.new("RGB", (84, 60)).save(tmp_path / "0.png")
    turns = [{"from": "human", "value": "<image>\nwhere?"}, {"from": "gpt", "value": "ok"}]
    items = [{"id": str(n), "image": "0.png", "conversations": turns} for n in range(12)]
    (tmp_path / "data.json").write_text(json.dumps(items))
    records = open_records(tmp_path / "data.json")
    length = data(records, "anyres", tiles=8).tokens_per_epoch // 12
    ends = {
        tuple(row[-2:])
        for batch in arrays(data(records, "anyres", max_length=length, tiles=8, crop=0.6))
        for row in batch["labels"]
    }
    assert len(ends) == 1
