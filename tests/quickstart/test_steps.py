"""The quickstart's order of work."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava_jax.errors import LlavaError
from llava_jax.quickstart import __main__ as quickstart

ROOT = Path(__file__).parents[2]


def test_a_stage_that_was_stopped_is_not_scored(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT)
    steps = tmp_path / "runs/quickstart/instruct/checkpoints"
    monkeypatch.setattr(quickstart, "python", lambda *_: (steps / last).mkdir(parents=True))
    last = "13"
    with pytest.raises(LlavaError, match="runs/quickstart/instruct was stopped early"):
        quickstart.train("easy_vqa_instruct")
    last = "160"
    quickstart.train("easy_vqa_instruct")


@pytest.mark.parametrize(
    ("full", "run", "split"), [(False, "instruct", "test_1000"), (True, "full_instruct", "test")]
)
def test_the_steps_in_order_and_what_they_print(monkeypatch, tmp_path, capsys, full, run, split):
    """Training and scoring are left out: their commands are recorded, and answers are written."""
    monkeypatch.chdir(tmp_path)
    done = []

    def scored(script, *arguments):
        done.append((script, *arguments))
        folder = tmp_path / "runs/quickstart" / run / "eval/easy_vqa" / split
        folder.mkdir(parents=True)
        line = {"image": "test/0.png", "question": "what color is the shape?", "grade": 1.0}
        line |= {"prediction": "red", "reference": "red"}
        (folder / "predictions.jsonl").write_text(json.dumps(line) + "\n")

    pictures = tmp_path / "runs/quickstart/easy_vqa/images/test"
    pictures.mkdir(parents=True)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(pictures / "0.png")
    monkeypatch.setattr(quickstart, "prepare_parts", lambda _: done.append("parts"))
    monkeypatch.setattr(quickstart, "prepare_easy_vqa", lambda _: done.append("data"))
    monkeypatch.setattr(quickstart, "train", done.append)
    monkeypatch.setattr(quickstart, "python", scored)
    quickstart.quickstart(full)
    rounds = ["easy_vqa_align", "easy_vqa_instruct", *["easy_vqa_full_instruct"] * full]
    assert done[:-1] == ["parts", "data", *rounds]
    assert done[-1][0] == "eval.py" and done[-1][-1] == f"--checkpoint=runs/quickstart/{run}"
    assert f"--config.options.split={split}" in done[-1]
    printed = capsys.readouterr().out
    assert "test/0.png: what color is the shape? -> red" in printed
    assert printed.count(" min  ") == 6 + full  # the minutes of each step
    assert f"--image {Path('runs/quickstart/easy_vqa/images/test/0.png')}" in printed
    assert (tmp_path / "runs/quickstart" / run / "answers.png").is_file()
