"""The picture of answers: which are drawn, and that right and wrong ones both are."""

import json

import numpy as np
import pytest
from PIL import Image

from llava_jax.errors import LlavaError
from llava_jax.quickstart import picture

COLOR, SHAPE, YES_NO = "what color is the shape?", "what shape is present?", "is there a red shape?"


def line(image: int, question: str, prediction: str, reference: str) -> dict:
    return {
        "image": f"test/{image}.png",
        "question": question,
        "prediction": prediction,
        "reference": reference,
        "grade": float(prediction == reference),
    }


def test_kinds_take_turns_and_no_picture_comes_twice():
    lines = [line(i // 2, YES_NO, "no", "yes") for i in range(20)]
    lines += [line(0, COLOR, "red", "red"), line(50, COLOR, "blue", "blue")]
    lines += [line(60, SHAPE, "circle", "circle")]
    chosen = picture.choose(lines)
    assert [picture.kind_of(c) for c in chosen] == ["yes/no", "shape", "color"] + ["yes/no"] * 3
    assert [c["image"] for c in chosen] == [f"test/{i}.png" for i in (0, 60, 50, 1, 2, 3)]


def test_fewer_answers_than_places():
    assert len(picture.choose([line(0, COLOR, "red", "red"), line(0, SHAPE, "x", "circle")])) == 1
    assert picture.choose([]) == []


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("what color is the shape?", "what color\nis the shape?"),
        ("what?", "what?"),
    ],
)
def test_wrapped(question, expected):
    assert picture.wrapped(question) == expected


def test_draws_what_the_model_answered(tmp_path):
    (tmp_path / "test").mkdir()
    lines = [line(0, COLOR, "red", "red"), line(1, SHAPE, "circle", "triangle")]
    for i in range(2):
        Image.fromarray(np.full((64, 64, 3), 40 * i, np.uint8)).save(tmp_path / f"test/{i}.png")
    predictions = tmp_path / "predictions.jsonl"
    predictions.write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    drawn = picture.draw_answers(predictions, tmp_path, tmp_path / "answers.png")
    assert sorted(entry["image"] for entry in drawn) == ["test/0.png", "test/1.png"]
    with Image.open(tmp_path / "answers.png") as image:
        assert image.width > image.height > 100
    predictions.write_text("")
    with pytest.raises(LlavaError, match="has no answers"):
        picture.draw_answers(predictions, tmp_path, tmp_path / "answers.png")
