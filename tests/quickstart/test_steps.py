"""The quickstart's order of work."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava_jax.errors import LlavaError
from llava_jax.quickstart import __main__ as quickstart
from llava_jax.quickstart import commands, family

ROOT = Path(__file__).parents[2]


def test_a_stage_that_was_stopped_is_not_scored(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT)
    steps = tmp_path / "runs/quickstart/instruct/checkpoints"
    monkeypatch.setattr(commands, "python", lambda *_: (steps / last).mkdir(parents=True))
    last = "13"
    with pytest.raises(LlavaError, match="runs/quickstart/instruct was stopped early"):
        commands.train("easy_vqa_instruct")
    last = "160"
    commands.train("easy_vqa_instruct")


@pytest.mark.parametrize(
    ("full", "run", "split", "loss", "accuracy"),
    [(False, "instruct", "test_1000", 0.05, 97.5), (True, "full_instruct", "test", 0.31, 77.9)],
)
def test_the_steps_in_order_and_what_they_print(
    monkeypatch, tmp_path, capsys, full, run, split, loss, accuracy
):
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
        scores = {"scores": {"overall": {"accuracy": accuracy}}}
        (folder / "metrics.json").write_text(json.dumps(scores))

    def trained(recipe):
        done.append(recipe)
        folder = tmp_path / "runs/quickstart/align"
        folder.mkdir(exist_ok=True)
        values = ({"validation_loss": 0.9}, {"loss": 0.1}, {"validation_loss": loss})
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, values)))

    pictures = tmp_path / "runs/quickstart/easy_vqa/images/test"
    pictures.mkdir(parents=True)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(pictures / "0.png")
    monkeypatch.setattr(quickstart, "prepare_parts", lambda _: done.append("parts"))
    monkeypatch.setattr(quickstart, "prepare_easy_vqa", lambda _: done.append("data"))
    monkeypatch.setattr(quickstart, "train", trained)
    monkeypatch.setattr(quickstart, "python", scored)
    quickstart.quickstart(full)
    rounds = ["easy_vqa_align", "easy_vqa_instruct", *["easy_vqa_full_instruct"] * full]
    assert done[:-1] == ["parts", "data", *rounds]
    assert done[-1][0] == "eval.py" and done[-1][-1] == f"--checkpoint=runs/quickstart/{run}"
    assert f"--config.options.split={split}" in done[-1]
    printed = capsys.readouterr().out
    assert "test/0.png: what color is the shape? -> red" in printed
    assert printed.count(" min  ") == 6 + full  # the minutes of each step
    assert ("held-out captions is 0.31, not below 0.2" in printed) == (loss > 0.2)
    assert ("WARNING: 77.9% of the answers are right" in printed) == (accuracy < 95)
    assert f"--image {Path('runs/quickstart/easy_vqa/images/test/0.png')}" in printed
    assert (tmp_path / "runs/quickstart" / run / "answers.png").is_file()


def test_the_proofs_of_the_family_in_order_and_their_table(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/quickstart/instruct/checkpoints/160").mkdir(parents=True)
    done = []

    def scored(script, *arguments):
        given = dict(argument.split("=") for argument in arguments)
        run, split = Path(given["--checkpoint"]), given["--config.options.split"]
        done.append((run.name, split))
        folder = run / "eval/easy_vqa" / split
        folder.mkdir(parents=True, exist_ok=True)
        right = 95.0 if len(done) % 2 else 33.0
        score = {"count": 400, "accuracy": right, "blind": 34.0}
        (folder / "metrics.json").write_text(json.dumps({"scores": {"overall": score}}))

    monkeypatch.setattr(family, "prepare_composed", lambda name, _: done.append(name))
    monkeypatch.setattr(family, "train", done.append)
    monkeypatch.setattr(family, "python", scored)
    family.family()
    assert done[:5] == [
        "poster",
        "easy_vqa_poster",
        "easy_vqa_poster_one_view",
        ("poster_tiles", "test"),
        ("poster_one_view", "test"),
    ]
    table = (tmp_path / "runs/quickstart/family.txt").read_text()
    assert table.strip() in capsys.readouterr().out
    assert table.count("400") == 3 and table.count("34.0") == 3


def test_the_family_needs_the_quickstart(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LlavaError, match="run `make quickstart` first"):
        family.family()
