"""RefCOCO: what is asked, when boxes are near enough, both boxes drawn."""

import pickle

import pytest
from PIL import Image

from llava_jax.data.boxes import Boxes
from llava_jax.errors import LlavaError
from llava_jax.evaluation import load_benchmark, runner
from llava_jax.evaluation.refcoco import iou
from tests.evaluation.published import lines, prompts, write
from tests.tiny_model import tiny_llava


def test_intersection_over_union():
    assert iou((0, 0, 2, 2), (0, 0, 2, 2)) == 1
    assert iou((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(1 / 3)
    assert iou((0, 0, 2, 2), (2, 0, 4, 2)) == 0
    assert iou((2, 2, 0, 0), (0, 0, 2, 2)) == 0  # corners swapped
    assert iou((1, 1, 1, 1), (1, 1, 1, 1)) == 0


def refcoco(root, name="refcoco", file="refs(unc).p", split="val", refs=None):
    def ref(id, split, *texts):
        sentences = [{"sent_id": 10 * id + i, "sent": text} for i, text in enumerate(texts)]
        return {"ref_id": id, "ann_id": id, "image_id": 5, "split": split, "sentences": sentences}

    instances = {
        "images": [{"id": 5, "file_name": "COCO_train2014_000000000005.jpg",
                    "width": 200, "height": 100}],
        "annotations": [{"id": 1, "bbox": [50, 0, 100, 50]}, {"id": 2, "bbox": [0, 0, 10, 10]}],
    }  # fmt: skip
    write(root, f"{name}/instances.json", instances)
    refs = refs or [ref(1, split, "lady with the blue shirt", "left"), ref(2, "train", "dog")]
    (root / name / file).write_bytes(pickle.dumps(refs, protocol=2))
    return load_benchmark("refcoco", root, {"name": name, "split": split})


def test_refcoco_asks_for_a_box_and_counts_half_overlap(tmp_path):
    benchmark = refcoco(tmp_path)
    assert prompts(benchmark) == [
        "<image>\nPlease provide the bounding box coordinate of the region this sentence "
        f"describes: {text}."
        for text in ("lady with the blue shirt", "left")
    ]
    assert benchmark.questions[0].images == (
        str(tmp_path / "train2014/COCO_train2014_000000000005.jpg"),
    )
    # The right box is (0.25, 0.25, 0.75, 0.5) of the square; half of it is just enough.
    answers = ["[0.25, 0.25, 0.5, 0.5]", "[0.25, 0.25, 0.49, 0.5]"]
    # Half of the box has an IoU of 0.5, a little less one of 0.48; both centres are inside.
    assert lines(benchmark.score(benchmark.questions, answers)) == {
        "overall": (2, {"accuracy": 50.0, "IoU 0.1": 100.0, "IoU 0.3": 100.0, "IoU 0.7": 0.0,
                        "IoU 0.9": 0.0, "centre": 100.0, "mean IoU": 49.0})
    }  # fmt: skip
    (line,) = benchmark.score(benchmark.questions, ["no box", "[0.25, 0.25, 0.75, 0.5]"])
    assert line.values == dict.fromkeys(line.values, 50.0)
    # In the padding above the picture; only the first box counts; there must be one.
    for text in ("[0.25, 0, 0.75, 0.25]", "[0, 0, 0.1, 0.1] [0.25, 0.25, 0.75, 0.5]", "no box"):
        assert benchmark.grade(benchmark.questions[0], text) == 0


def test_refcocog_has_its_own_splits(tmp_path):
    benchmark = refcoco(tmp_path, "refcocog", "refs(umd).p", "test")
    assert benchmark.name == "refcocog/test" and len(benchmark.questions) == 2
    for name, split in (("refcocog", "testA"), ("refcoco", "test"), ("refclef", "val")):
        with pytest.raises(LlavaError, match="unknown set and split"):
            load_benchmark("refcoco", tmp_path, {"name": name, "split": split})


class Run:
    def __reduce__(self):
        return print, ("this runs when the file is read",)


def test_a_pickle_that_runs_code_is_refused(tmp_path, capsys):
    with pytest.raises(LlavaError, match=r"cannot read .*refs\(unc\).p: it wants to run .*print"):
        refcoco(tmp_path, refs=[Run()])
    assert "this runs" not in capsys.readouterr().out
    (tmp_path / "refcoco/refs(unc).p").write_bytes(b"no pickle")
    with pytest.raises(LlavaError, match=r"cannot read .*refs\(unc\).p"):
        load_benchmark("refcoco", tmp_path, {"name": "refcoco", "split": "val"})


def test_boxes_are_drawn_where_they_are(tmp_path):
    benchmark = refcoco(tmp_path)
    image = Image.new("RGB", (200, 100))
    drawn = benchmark.draw(image, benchmark.questions[0], "[0.0, 0.5, 0.1, 0.75]")
    assert drawn.getpixel((50, 20)) == (0, 255, 0) and drawn.getpixel((10, 50)) == (255, 0, 0)


SAID = "[50, 0, 150, 50]"


def test_a_model_is_scored_in_the_convention_that_it_writes(tmp_path, monkeypatch):
    """The runner reads the boxes of a model as that model writes them."""
    benchmark = refcoco(tmp_path / "data")
    model = tiny_llava()
    say = lambda asker, name, questions, *_: {q.id: {"prediction": SAID} for q in questions}
    monkeypatch.setattr(runner.Asker, "answer", say)
    for convention, accuracy in (("pixel", 100.0), ("llava", 0.0)):
        model.boxes = Boxes(convention, model.config.image)
        (line,) = runner.evaluate(model, benchmark, tmp_path / convention, 4, 1)
        assert line.values["accuracy"] == accuracy
    assert "grade" in (tmp_path / "pixel" / "predictions.jsonl").read_text()
