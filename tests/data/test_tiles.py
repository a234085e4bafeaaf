"""Rows of pictures that are cut into tiles: two budgets, and what does not fit them."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from llava_jax.data.media import load_image, preprocess
from llava_jax.data.pipeline import TrainingData
from llava_jax.data.records import open_records
from llava_jax.data.rows import RowFormat
from llava_jax.data.show import as_text, show
from llava_jax.errors import LlavaError
from llava_jax.models.anyres import Tiling
from llava_jax.models.images import ImageSpec
from llava_jax.text.templates import get_template
from tests.data.conftest import record
from tests.tiny_model import byte_tokenizer, random_image

# Tiles of 28 pixels with 4 features each; a picture of 100 x 20 takes 1 + 3 of them.
SPEC = ImageSpec(28, "anyres", tiling=Tiling(((1, 1), (2, 1), (1, 2), (3, 1)), one_view=True))
FORMAT = RowFormat(get_template("chatml"), SPEC, tokens_per_tile=4, max_length=160, tiles=4)
SIZES = {"small": (20, 20), "wide": (50, 20), "widest": (100, 20), "high": (20, 50)}


@pytest.fixture
def records(tmp_path):
    for i, (name, size) in enumerate(SIZES.items()):
        random_image(i, size).save(tmp_path / f"{name}.png")
    items = [record(f"r{i}", image=f"{name}.png") for i, name in enumerate([*SIZES] * 3)]
    items += [record("two", "<image> and <image>?", image=["wide.png", "high.png"])]
    items += [record(f"text{i}", "Hi?") for i in range(3)]
    (tmp_path / "data.json").write_text(json.dumps(items))
    return open_records(tmp_path / "data.json")


def data_of(records, **changes) -> TrainingData:
    row_format = dataclasses.replace(FORMAT, **changes)
    options = {"batch_size": 1, "epochs": 1, "progress": False}
    return TrainingData(records, byte_tokenizer(), row_format, **options)


def test_a_row_holds_several_conversations_within_both_budgets(records):
    data = data_of(records, row_length=320, tiles=7)
    seen = 0
    for batch in data.batch_iterator():
        segments = batch.arrays["segment_ids"][0]
        assert batch.arrays["tiles"].shape == (1, 7, 28, 28, 3) and segments.shape == (320,)
        seen += segments.max()
        used = batch.arrays["tiles"][0].reshape(7, -1).any(axis=1)
        assert used.any() or "text" in batch.record_ids[0]
    assert seen == len(records) == data.records_used
    assert data.tiles_per_epoch == 3 * (2 + 3 + 4 + 3) + 2  # two pictures: a view each
    share = data.tokens_per_epoch / (data.rows_per_epoch * 320)
    tiles = data.tiles_per_epoch / (data.rows_per_epoch * 7)
    assert f"{share:.0%} of tokens and {tiles:.0%} of tiles used" in data.describe()


def test_several_pictures_are_one_padded_view_each(records):
    (batch,) = [
        b for b in data_of(records, packing=False).batch_iterator() if "two" in b.record_ids
    ]
    for tile, name in enumerate(("wide", "high")):
        image = load_image(f"{records.image_root}/{name}.png")
        (view,) = preprocess(image, SPEC, several=True)
        np.testing.assert_array_equal(batch.arrays["tiles"][0, tile], view)
        assert not np.array_equal(view, preprocess(image, SPEC)[0])


def test_what_a_row_has_no_room_for_is_named_with_what_it_needs(records):
    data = data_of(records, tiles=3)
    assert data.refused == {"more tiles than images_per_row=3": [2, 6, 10]}
    reason = "3 refused: more tiles than images_per_row=3 (index 2, 6, 10), needing up to 4 tiles"
    assert reason in data.describe()
    with pytest.raises(LlavaError, match="13 refused: .*max_length=20 .*needing up to 93 tok"):
        data_of(records, max_length=20)


def test_a_row_must_have_room_for_a_conversation(records):
    with pytest.raises(LlavaError, match="data.row_length is 100: a row must have room for .*160"):
        data_of(records, row_length=100)


def test_show_tells_the_grid(records):
    shown = show(records, 2, FORMAT, byte_tokenizer())
    assert shown["image_slots"][0]["grid"] == (3, 1) and shown["image_slots"][0]["tiles"] == 4
    assert "widest.png, 100x20 pixels, a base view and 3x1 tiles, in tokens " in as_text(
        shown, False
    )
    both = show(records, 12, FORMAT, byte_tokenizer())
    assert [slot["grid"] for slot in both["image_slots"]] == [None, None]
    crowded = dataclasses.replace(FORMAT, tiles=3)
    assert show(records, 2, crowded, byte_tokenizer())["training"] == (
        "left out: more tiles than images_per_row=3"
    )


def test_a_picture_that_changed_its_size_is_measured_again(records, tmp_path):
    options = {"batch_size": 1, "epochs": 1, "progress": False, "cache_dir": tmp_path / "cache"}
    before = TrainingData(records, byte_tokenizer(), FORMAT, **options)
    Image.new("RGB", SIZES["widest"]).save(tmp_path / "small.png")
    after = TrainingData(records, byte_tokenizer(), FORMAT, **options)
    assert after.tiles_per_epoch == before.tiles_per_epoch + 3 * 2
