"""The quickstart's order of work."""

from pathlib import Path

import pytest

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
