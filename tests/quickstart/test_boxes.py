"""The quickstart's records with boxes: true to the pixels, each question with one answer."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("easy_vqa")

from llava_jax.data.boxes import Boxes
from llava_jax.data.records import checked_record, open_records
from llava_jax.evaluation import load_benchmark
from llava_jax.files import write_records
from llava_jax.models.images import ImageSpec
from llava_jax.quickstart import boxes
from llava_jax.quickstart.composed import box_of
from llava_jax.quickstart.easy_vqa import conversation
from llava_jax.quickstart.packages import package_folder


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """As `make quickstart` leaves it, of few records."""
    root = tmp_path_factory.mktemp("quickstart")
    images = root / "easy_vqa" / "images"
    images.mkdir(parents=True)
    for split in ("train", "test"):
        source = package_folder("easy_vqa", "easy-vqa") / "data" / split / "images"
        shutil.copytree(source, images / split)
    old = {"image": "train/0.png", "conversations": conversation([("what?", "a circle")])}
    write_records(root / "easy_vqa" / "instruct.json", [old | {"id": "0"}])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"SINGLES": 30, "MOSAICS": 30, "OLD": 5, "TEST": 25}.items():
            patch.setattr(boxes, name, value)
        boxes.prepare_boxes(root, log=lambda *_: None)
    return root


def test_the_box_of_a_shape_is_all_that_differs_from_the_background():
    picture = Image.new("RGB", (64, 64), (240, 240, 240))
    picture.paste((200, 0, 0), (10, 20, 30, 41))
    picture.putpixel((60, 60), (236, 240, 240))  # of the compression, if there were one
    assert box_of(picture, boxes.BACKGROUND) == (10, 20, 30, 41)
    assert box_of(picture) == (10, 20, 61, 61)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_every_record_can_be_trained_on_and_its_boxes_are_of_shapes(root, split):
    records = open_records(root / "boxes" / f"{split}.json", root)
    for index in range(len(records)):
        record = checked_record(records, index)
        pixels = np.asarray(Image.open(record.images[0]).convert("RGB")).astype(int)
        for box in record.boxes:
            left, top, right, bottom = map(int, box.pixels(pixels.shape[1::-1]))
            quarter = pixels[top // 64 * 64 :, left // 64 * 64 :][:64, :64]
            differs = np.abs(quarter - quarter[0, 0]).sum(-1) > boxes.BACKGROUND
            inside = differs[top % 64 : (bottom - 1) % 64 + 1, left % 64 : (right - 1) % 64 + 1]
            assert inside.sum() == differs.sum() > 0
            assert inside[0].any() and inside[-1].any() and inside[:, 0].any()


def test_a_question_about_a_mosaic_has_one_answer(root):
    asked = {}
    for item in json.loads((root / "boxes" / "train.json").read_text()):
        turns = item["conversations"][::2]
        asked[item["id"]] = [turn["value"].removeprefix("<image>\n") for turn in turns]
        if "boxes" in item:
            wheres = [text for text in asked[item["id"]] if text.startswith("where")]
            assert len(set(wheres)) == len(wheres)
            whats = [
                tuple(box)
                for box, text in zip(item["boxes"], asked[item["id"]], strict=True)
                if text.startswith("what")
            ]
            assert len(set(whats)) == len(whats)
            corners = {(box[0] // 64, box[1] // 64) for box in item["boxes"]}
            assert len(corners) == len(set(map(tuple, item["boxes"])))
    assert ["what?"] in asked.values()  # an old conversation
    assert [len(texts) for texts in asked.values()].count(3) == 30


def test_pictures_of_the_splits_never_meet(root):
    names = {}
    for split in ("train", "val", "test"):
        items = json.loads((root / "boxes" / f"{split}.json").read_text())
        names[split] = {item["image"] for item in items}
    assert not names["train"] & names["val"] and not names["train"] & names["test"]
    assert all(
        name.startswith(("easy_vqa/images/test", "boxes/images/test")) for name in names["test"]
    )


def test_answers_are_scored_by_overlap_and_by_name(root):
    benchmark = load_benchmark("easy_vqa_boxes", root, {"split": "test"})
    kinds = [question.kind for question in benchmark.questions]
    assert {k: kinds.count(k) for k in kinds} == dict.fromkeys(
        ("where", "what", "where, mosaic", "what, mosaic"), 25
    )
    references = [question.reference for question in benchmark.questions]
    lines = {line.kind: line for line in benchmark.score(benchmark.questions, references)}
    assert lines["overall"].values == {"accuracy": 100.0}
    assert lines["where"].values["mean IoU"] > 90 and lines["where, mosaic"].values["centre"] == 100
    wrong = ["[0.0, 0.0, 1.0, 1.0]"] * len(references)
    assert benchmark.score(benchmark.questions, wrong)[-1].values["accuracy"] < 10
    # A model with another convention is asked and read in its own.
    other = benchmark.reading(Boxes("pixel", ImageSpec(56, "square")))
    what = next(question for question in other.questions if question.kind == "what")
    assert str(list(map(round, what.label[0]))) in what.prompt and "<box>" not in what.prompt
    where = other.questions[0]
    assert where.reference == str(list(map(round, where.label[0])))
    assert other.grade(where, where.reference) == 1
