"""The data sets composed of easy-VQA's pictures: true answers, and ablations that lose them."""

import json
import random

import numpy as np
import pytest

pytest.importorskip("easy_vqa")
from PIL import Image

from llava_jax.data.records import open_records
from llava_jax.quickstart import composed


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("composed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(composed, "TRAIN", dict.fromkeys(composed.TRAIN, 12))
        patch.setattr(composed, "TEST", 20)
        for name in composed.TRAIN:
            composed.prepare_composed(name, root / name, log=lambda *_: None)
    return root


def test_a_folder_of_other_code_is_written_again(tmp_path, monkeypatch):
    code = tmp_path / "code.py"
    code.write_text("1")
    monkeypatch.setattr(composed, "SOURCES", [str(code)])
    monkeypatch.setattr(composed, "TRAIN", dict.fromkeys(composed.TRAIN, 2))
    monkeypatch.setattr(composed, "TEST", 2)
    out, told = tmp_path / "poster", []
    for text in ("1", "1", "2"):
        code.write_text(text)
        composed.prepare_composed("poster", out, told.append)
    written = [line for line in told if "writing" in line]
    assert len(written) == 2 and "written by another version" in "".join(told)


def lines(path):
    return json.loads(path.read_text())


@pytest.mark.parametrize("name", composed.TRAIN)
def test_every_record_has_its_files_and_its_answer(folder, name):
    for file in sorted((folder / name).glob("t*.json")):
        for line in lines(file):
            media = line.get("image") or line["video"]
            for path in [media] if isinstance(media, str) else media:
                assert (folder / name / "images" / path).exists()
            shown = line["conversations"][0]["value"].split("\n")[:-1]
            if isinstance(media, str):
                assert shown == ["<image>"]
            else:
                assert shown == [f"picture {i + 1}: <image>" for i in range(len(media))]


@pytest.mark.parametrize(
    "name, ablated",
    [
        ("poster", set()),
        ("several", {"test_ablation"}),
        ("video", {"train_ablation", "test_ablation"}),
    ],
)
def test_an_ablation_is_asked_the_same_and_shown_something_else(folder, name, ablated):
    found = {path.stem for path in (folder / name).glob("t*.json")}
    assert found == {"train", "test"} | ablated
    for split in ablated:
        whole = lines(folder / name / f"{split.removesuffix('_ablation')}.json")
        for one, other in zip(whole, lines(folder / name / f"{split}.json"), strict=True):
            assert one.get("question") == other.get("question")
            assert one.get("answer") == other.get("answer")
            assert (one.get("image"), one.get("video")) != (other["image"], other.get("video"))
    blind = json.loads((folder / name / "blind.json").read_text())
    assert blind.keys() == {split for split in found if split.startswith("test")}


def test_posters_are_learnt_by_color_and_shape_and_tested_by_shape(folder):
    turns = [line["conversations"] for line in lines(folder / "poster" / "train.json")]
    assert all(
        sum(word in turn["value"] for turn in record) == len(composed.CORNERS)
        for record in turns
        for word in ("what color", "what shape")
    )
    tests = lines(folder / "poster" / "test.json")
    assert all(line["question"].startswith("what shape is in the ") for line in tests)


def test_the_picture_that_is_named_has_the_color_and_not_after_the_shuffle(folder):
    rgb = {"red": (255, 0, 0), "blue": (0, 0, 255), "black": (0, 0, 0), "yellow": (255, 255, 0)}
    seen = 0
    for split, holds in (("test", True), ("test_ablation", False)):
        for line in lines(folder / "several" / f"{split}.json"):
            color = line["question"].rstrip("?").split()[-1]
            if color in rgb:
                path = line["image"][int(line["answer"]) - 1]
                with Image.open(folder / "several" / "images" / path) as picture:
                    pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
                found = (np.abs(pixels.astype(int) - rgb[color]).sum(-1) < 30).sum() > 40
                assert found == holds
                seen += 1
    assert seen


def test_frames_move_in_the_direction_of_the_answer(folder):
    for line in lines(folder / "video" / "test.json"):
        if line["kind"] != "direction":
            continue
        centers = []
        for i in range(composed.FRAMES):
            path = folder / "video" / "images" / line["video"] / f"{i}.png"
            with Image.open(path) as picture:
                pixels = np.asarray(picture.convert("RGB")).astype(int)
            corner = pixels[0, -1] if (pixels[0, -1] == pixels[-1, 0]).all() else pixels[-1, -1]
            ys, xs = np.where(np.abs(pixels - corner).sum(-1) > 90)
            centers.append((xs.mean(), ys.mean()))
        moved = np.array(centers[-1]) - centers[0]
        wanted = composed.DIRECTIONS[line["answer"]]
        assert np.dot(moved, wanted) > 20 and abs(np.dot(moved, wanted[::-1])) < 6


def test_a_shape_in_the_middle_says_nothing_of_its_direction():
    shapes = composed.read_shapes("test")[:40]
    rng = random.Random(0)
    middles = {word: [] for word in composed.DIRECTIONS}
    for i in range(800):
        example = composed._video(rng, shapes, str(i))
        (_, answer), *_ = example.questions
        if answer in middles:
            pixels = np.asarray(example.media[composed.FRAMES // 2][1]).astype(int)
            ys, xs = np.where(np.abs(pixels - pixels[0, 0]).sum(-1) > 90)
            middles[answer].append((xs.mean(), ys.mean()))
    means = np.array([np.mean(places, axis=0) for places in middles.values()])
    assert np.ptp(means, axis=0).max() < 3


def test_a_side_of_the_frame_is_the_one_with_the_shape():
    frame = Image.new("RGB", (64, 64), (240, 240, 240))
    frame.paste((200, 0, 0), (4, 20, 24, 40))  # to the left, at half the height
    assert composed._sides(frame, "last") == [
        ("is the shape left or right in the last frame?", "left")
    ]
    frame.paste((240, 240, 240), (0, 0, 64, 64))
    frame.paste((200, 0, 0), (40, 44, 60, 64))
    assert [answer for _, answer in composed._sides(frame, "first")] == ["right", "down"]


def test_the_records_can_be_read_for_training(folder):
    records = open_records(folder / "several" / "train.json", folder / "several" / "images")
    assert {len(records[i].images) for i in range(len(records))} <= {2, 3, 4}
