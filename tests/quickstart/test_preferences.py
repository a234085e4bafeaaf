"""The quickstart's pairs: right answers chosen, wrong ones of the same kind rejected."""

import collections
import json

import pytest

pytest.importorskip("easy_vqa")

from llava_jax.data.parsing import parse_record
from llava_jax.quickstart import preferences
from llava_jax.quickstart.easy_vqa import COLORS, SHAPES, read_questions


def test_pairs(tmp_path, monkeypatch):
    (tmp_path / "easy_vqa").mkdir()
    held_out = [{"image": "train/3.png"}, {"image": "train/4.png"}]
    (tmp_path / "easy_vqa/val_instruct.json").write_text(json.dumps(held_out))
    monkeypatch.setattr(preferences, "PICTURES", 50)
    out = preferences.prepare_preferences(tmp_path, log=lambda *_: None)
    items = {name: json.loads((out / f"{name}.json").read_text()) for name in ("train", "val")}
    assert {item["image"] for item in items["val"]} <= {"train/3.png", "train/4.png"}
    assert not {item["image"] for item in items["train"]} & {"train/3.png", "train/4.png"}
    known = {(q.image, q.text): q.answer for q in read_questions("train")}
    groups = collections.Counter()
    for index, item in enumerate(items["train"]):
        record = parse_record(item, index, None, pairs=True)
        number, _, group = record.id.partition("-")
        question, chosen = (turn.text for turn in record.turns)
        assert chosen == known[int(number), question.removeprefix("<image>\n")]
        kind = next(kind for kind in (("yes", "no"), COLORS, SHAPES) if chosen in kind)
        assert record.rejected in kind and record.rejected != chosen
        groups[group] += 1
    assert groups == dict.fromkeys(("absent", "present", "name"), 50)
