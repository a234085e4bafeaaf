"""COCO captions: the prompt, the results file, CIDEr, and errors if its parts are missing."""

import importlib.util
import json
import shutil

import pytest

from llava_jax.errors import LlavaError
from llava_jax.evaluation import coco_captions, load_benchmark
from tests.evaluation.published import prompts, write


@pytest.fixture
def root(tmp_path):
    captions = {
        7: ["a man riding a wave on a surfboard", "a surfer on a big wave"],
        9: ["two dogs playing in the snow", "dogs run through deep snow"],
    }
    data = {
        "images": [{"id": i, "file_name": f"COCO_val2014_{i:012d}.jpg"} for i in captions],
        "annotations": [{"image_id": i, "caption": c} for i in captions for c in captions[i]],
    }
    write(tmp_path, "annotations/captions_val2014.json", data)
    return tmp_path


def test_missing_parts_are_reported_before_the_model_is_asked(root, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LlavaError, match=r"pip install 'llava_jax\[captions\]'"):
        load_benchmark("coco_captions", root, {"split": "val2014"})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(LlavaError, match="`java` is not installed"):
        load_benchmark("coco_captions", root, {"split": "val2014"})


def test_prompt_and_results_file(root, monkeypatch):
    monkeypatch.setattr(coco_captions, "_require_scorer", lambda: None)
    benchmark = load_benchmark("coco_captions", root, {"split": "val2014"})
    assert prompts(benchmark)[0] == (
        "<image>\nProvide a one-sentence caption for the provided image."
    )
    assert benchmark.questions[1].images == (str(root / "val2014/COCO_val2014_000000000009.jpg"),)
    path = benchmark.submit(benchmark.questions, ["a\rwave", "dogs"], root)
    assert json.loads(path.read_text()) == [
        {"image_id": 7, "caption": "a wave"},
        {"image_id": 9, "caption": "dogs"},
    ]
    with pytest.raises(LlavaError, match="unknown COCO split 'test'"):
        load_benchmark("coco_captions", root, {"split": "test"})


def test_a_picture_without_captions_is_reported(root, monkeypatch):
    monkeypatch.setattr(coco_captions, "_require_scorer", lambda: None)
    path = root / "annotations/captions_val2014.json"
    data = json.loads(path.read_text())
    data["images"].append({"id": 11, "file_name": "a.jpg"})
    path.write_text(json.dumps(data))
    with pytest.raises(LlavaError, match="record 2: image 11 has no caption"):
        load_benchmark("coco_captions", root, {"split": "val2014"})


def test_cider_is_the_official_packages(root):
    pytest.importorskip("pycocoevalcap")
    if shutil.which("java") is None:
        pytest.skip("the tokenizer of pycocoevalcap needs Java")
    benchmark = load_benchmark("coco_captions", root, {"split": "val2014"})
    questions = benchmark.questions

    def cider(*texts):
        (score,) = benchmark.score(questions, texts)
        return score.values["CIDEr"]

    right = ("A man riding a wave on a surfboard.", "two dogs playing, in the snow")
    assert cider(*right) > 300  # of 1,000; two references that differ hold it down
    assert cider(*reversed(right)) < 50 and cider("", "") == 0
    for end in ("\n", "\r", "\x0b", "\u2028"):  # of lines, some of the tokenizer's too
        assert cider(right[0].replace(" wave", f"{end}wave"), right[1]) == cider(*right)
