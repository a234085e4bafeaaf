"""Boxes of records: read, refused, written into the text of rows, kept by data sets, drawn."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from llava_jax.data.boxes import Boxes
from llava_jax.data.build import build_data_set
from llava_jax.data.pipeline import TrainingData
from llava_jax.data.records import open_records
from llava_jax.data.rows import RowFormat
from llava_jax.data.show import as_text, draw_record, show
from llava_jax.data.validate import validate
from llava_jax.errors import LlavaError, RecordError
from llava_jax.models.images import ImageSpec
from llava_jax.text.templates import get_template
from tests.tiny_model import byte_tokenizer

SIZE = (200, 100)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def record(boxes=((50, 0, 150, 50),), texts=("where is it?", "at <box>."), **more) -> dict:
    turns = [
        {"from": ("human", "gpt")[i % 2], "value": ("" if i else "<image>\n") + text}
        for i, text in enumerate(texts)
    ]
    item = {"id": "r", "image": "a.png", "boxes": [list(box) for box in boxes]}
    return item | {"box_format": "xyxy_pixel", "conversations": turns} | more


@pytest.fixture
def folder(tmp_path):
    for name, size in (("a.png", SIZE), ("b.png", (100, 100))):
        Image.new("RGB", size, "gray").save(tmp_path / name)
    return tmp_path


def opened(folder, *items):
    path = folder / "data.json"
    path.write_text(json.dumps(list(items)))
    return open_records(path)


def rows(mode="pad", convention="llava", **options) -> RowFormat:
    return RowFormat(
        get_template("v1"), ImageSpec(28, mode), 4, 400, 8, box_convention=convention, **options
    )


def text_of(folder, tokenizer, item, **options) -> str:
    return show(opened(folder, item), 0, rows(**options), tokenizer)["text"]


def test_boxes_are_written_in_the_convention_of_the_recipe(folder, tokenizer):
    two = record(
        ((50, 0, 150, 50), (0, 0, 200, 100)),
        ("what is at <box>?", "A cat.", "where is the rest?", "Here: <box>"),
    )
    text = text_of(folder, tokenizer, two)
    assert "what is at [0.25, 0.25, 0.75, 0.5]? ASSISTANT: A cat." in text
    assert "Here: [0.0, 0.25, 1.0, 0.75]</s>" in text
    assert "[250, 0, 750, 500]" in text_of(folder, tokenizer, two, convention="qwen_1000")
    assert "at [0.0, 0.0, 1.0, 0.5]?" in text_of(folder, tokenizer, two, mode="square")
    independent = text_of(folder, tokenizer, two, turns="independent")
    assert independent.count("[0.25, 0.25, 0.75, 0.5]") == 1


@pytest.mark.parametrize(
    ("form", "values"),
    {
        "xyxy_pixel": (50, 0, 150, 50),
        "xyxy_relative": (0.25, 0, 0.75, 0.5),
        "xywh_pixel": (50, 0, 100, 50),
        "xywh_relative": (0.25, 0, 0.5, 0.5),
    }.items(),
)
def test_every_declared_form_is_the_same_box(folder, form, values):
    (box,) = opened(folder, record((values,), box_format=form))[0].boxes
    assert box.pixels(SIZE) == (50, 0, 150, 50)


def test_text_that_happens_to_hold_the_mark_stays_text(folder, tokenizer):
    item = record(texts=("write <box>", "<box>"))
    del item["boxes"], item["box_format"]
    assert text_of(folder, tokenizer, item).count("<box>") == 2
    other = record(texts=("where?", "here"))  # of another program: no text refers to them
    del other["box_format"]
    assert opened(folder, other)[0].ignored_keys == ("boxes",)
    assert opened(folder, record())[0].ignored_keys == ()


NAN = float("nan")
FAULTS = {
    "no format": (record(box_format=None), r"box_format None: declare one of xyxy_pixel, xyxy_r"),
    "unknown format": (record(box_format="cxcywh"), "box_format 'cxcywh': declare one of"),
    "too few": (record(texts=("<box>", "<box>")), "has 2 <box> in its text but 1 boxes"),
    "too many": (record(((1, 1, 2, 2),) * 2), "has 1 <box> in its text but 2 boxes"),
    "no list": (record() | {"boxes": "1 2 3 4"}, "must be a list of lists of four numbers, not '1"),
    "three numbers": (record() | {"boxes": [[1, 2, 3]]}, r"four numbers, not \[1, 2, 3\]"),
    "a truth": (record() | {"boxes": [[1, 2, 3, True]]}, r"four numbers, not \[1, 2, 3, True\]"),
    "crossed": (record(((9, 0, 5, 5),)), r"box 0: \[9, 0, 5, 5\] has no area as xyxy_pixel: left"),
    "no width": (record(((9, 0, 0, 5),), box_format="xywh_pixel"), "width and height must be"),
    "not finite": (record(((0, 0, NAN, 5),)), r"box 0: \[0, 0, nan, 5\] is not finite"),
    "outside": (record(((0, 0, 250, 5),)), r"box 0: \[0, 0, 250, 5\] is outside the pic"),
    "outside as share": (record(((0, 0, 50, 5),), box_format="xyxy_relative"), "is outside the"),
    "of which image": (record(image=["a.png", "b.png"], texts=("<image> where?", "<box>")),
                       "has 2 images: 'box_images' must be a list with the number of the image"),
    "no such image": (record(box_images=[1]), r"has 1 images: 'box_images' must be .* not \[1\]"),
}  # fmt: skip


@pytest.mark.parametrize(("item", "fault"), FAULTS.values(), ids=FAULTS)
def test_what_is_no_box_is_refused_at_the_start(folder, tokenizer, item, fault):
    records = opened(folder, record() | {"id": "good"}, item)
    with pytest.raises(LlavaError, match=r"data\.json: record 1 \(id 'r'\).*" + fault):
        TrainingData(records, tokenizer, rows(), batch_size=1, steps=1, progress=False)
    report = validate(records, rows(), tokenizer, progress=False)
    assert report.faulty == {1} and re.search(fault, report.text())


def test_a_box_that_the_crop_cuts_away_is_refused(folder, tokenizer):
    with pytest.raises(RecordError, match="box 0: .*is cut away: image_mode 'square' shows only"):
        text_of(folder, tokenizer, record(((0, 0, 40, 40),)), mode="square")


def test_of_several_pictures_each_box_is_on_its_own(folder, tokenizer):
    item = record(((50, 0, 150, 50), (50, 50, 100, 100)), ("<image> which?", "<box> and <box>"))
    item |= {"image": ["a.png", "b.png"], "box_images": [0, 1]}
    shown = show(opened(folder, item), 0, rows(), tokenizer)
    assert "[0.25, 0.25, 0.75, 0.5] and [0.5, 0.5, 1.0, 1.0]" in shown["text"]
    assert [box["image"] for box in shown["boxes"]] == [0, 1]
    picture = draw_record(opened(folder, item)[0], shown)
    red = np.argwhere(np.asarray(picture)[:, :, 0] > 200)
    assert picture.size == (300, 100) and np.asarray(picture)[75, 250].tolist() == [255, 0, 0]
    assert red[:, 1].min() >= 50 and not ((red[:, 1] > 151) & (red[:, 1] < 250)).any()


def test_show_prints_and_draws_boxes(folder, tokenizer):
    records = opened(folder, record())
    shown = show(records, 0, rows(), tokenizer)
    line = "box 0: 50, 0, 150, 50 in pixels of image 0, written [0.25, 0.25, 0.75, 0.5]"
    assert line in as_text(shown, colour=False)
    drawn = np.asarray(draw_record(records[0], shown))
    assert drawn[25, 50].tolist() == [255, 0, 0] and drawn[25, 100].tolist() == [128, 128, 128]


def test_a_record_with_boxes_whose_image_is_missing_is_left_out(folder, tokenizer):
    records = opened(folder, record(), record(image="gone.png") | {"id": "gone"})
    skipping = {"bad_image": "skip", "bad_image_ceiling": 1, "batch_size": 1, "steps": 1}
    data = TrainingData(records, tokenizer, rows(), progress=False, **skipping)
    assert data.refused == {"bad image": [1]}
    shown = show(records, 1, rows(), tokenizer)
    assert shown["training"].startswith("not used") and shown["boxes"][0]["pixels"] == (
        50,
        0,
        150,
        50,
    )


def test_a_built_set_has_the_same_boxes(folder, tokenizer):
    item = record(((0.25, 0, 0.75, 0.5),), box_format="xyxy_relative")
    records = opened(folder, item, record(texts=("none?", "none"), boxes=()))
    built = open_records(
        build_data_set(records.path, folder, folder / "out", "set", progress=False)
    )
    assert [built[i].boxes for i in range(2)] == [records[i].boxes for i in range(2)]
    texts = [show(r, 0, rows(), tokenizer)["text"] for r in (records, built)]
    assert texts[0] == texts[1] and "[0.25, 0.25, 0.75, 0.5]" in texts[0]
    other = opened(folder, record(((0.25, 0, 0.75, 0.6),), box_format="xyxy_relative"))
    again = build_data_set(other.path, folder, folder / "out", "other", progress=False)
    assert open_records(again).fingerprint() != built.fingerprint()


def test_rows_hold_what_was_measured_and_follow_a_changed_picture(folder, tokenizer):
    """The text of a box depends on the size of its picture, so it is measured anew."""
    records = opened(folder, record())
    arguments = {"batch_size": 1, "steps": 1, "progress": False, "cache_dir": folder / "cache"}
    fit = lambda: TrainingData(records, tokenizer, rows(convention="qwen_1000"), **arguments)
    decoded = lambda data: tokenizer.decode(
        [i for i in next(iter(data.batch_iterator())).arrays["input_ids"][0].tolist() if i > 0]
    )
    first = fit()
    assert "250, 0, 750, 500" in decoded(first)
    Image.new("RGB", (1000, 1000)).save(folder / "a.png")
    second = fit()
    assert "50, 0, 150, 50" in decoded(second)
    assert second.tokens_per_epoch != first.tokens_per_epoch
    boxes = Boxes("qwen_1000", ImageSpec(28, "pad"))
    assert boxes.write((50, 0, 150, 50), (1000, 1000)) == "[50, 0, 150, 50]"
