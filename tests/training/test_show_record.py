import json

import numpy as np
import pytest

from llava_jax.data.records import open_records
from llava_jax.data.rows import RowFormat
from llava_jax.data.show import show
from llava_jax.errors import LlavaError
from llava_jax.models.images import ImageSpec
from llava_jax.text.templates import get_template
from llava_jax.training import show_record


def test_json(data_set, tokenizer_folder, tokenizers, command, capsys):
    arguments = (data_set[0], "--index", 8, "--image_root", data_set[1], "--image_tokens", 3)
    assert (
        command(
            show_record, *arguments, "--tokenizer", tokenizer_folder, "--template", "v1", "--json"
        )
        == 0
    )
    shown = json.loads(capsys.readouterr().out)
    assert shown["id"] == "r8" and shown["index"] == 8 and shown["template"] == "v1"
    assert shown["text"].endswith("USER: <image> and <image>? ASSISTANT: blue blue blue blue </s>")
    count = len(shown["input_ids"])
    assert shown["position_ids"] == list(range(count)) and shown["segment_ids"] == [1] * count
    assert [slot["image"] for slot in shown["image_slots"]] == ["a/8.png", "a/8b.png"]
    for slot in shown["image_slots"]:
        assert shown["input_ids"][slot["start"] : slot["end"]] == [-200] * 3
    learnt = [i for i in shown["labels"] if i != -100]
    assert tokenizers["smollm"].decode(learnt) == " blue blue blue blue </s>"
    assert shown["lengths"] == {
        "tokens": count, "image_tokens": 6, "supervised_tokens": len(learnt),
    }  # fmt: skip


def test_text_marks_what_is_learnt(data_set, tokenizer_folder, command, capsys, monkeypatch):
    arguments = (data_set[0], "--index", 3, "--image_root", data_set[1])
    command(show_record, *arguments, "--tokenizer", tokenizer_folder, "--template", "chatml")
    out = capsys.readouterr().out
    assert "«blue blue blue blue <|im_end|>»\n<|im_start|>user\nand 你好?<|im_end|>\n" in out
    assert "image 0: a/3.png, 31x23 pixels, 1 tile(s), in tokens " in out
    assert " 576 of images, " in out and "in training: used whole" in out
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    command(show_record, *arguments, "--tokenizer", tokenizer_folder, "--template", "chatml")
    assert "\033[32mblue blue blue blue <|im_end|>\033[0m" in capsys.readouterr().out


def test_a_missing_image_does_not_hide_the_text(data_set, tokenizer_folder, command, capsys):
    (data_set[1] / "a/5.png").unlink()
    arguments = (data_set[0], "--image_root", data_set[1], "--tokenizer", tokenizer_folder)
    assert command(show_record, *arguments, "--index", 5) == 0
    out = capsys.readouterr().out
    assert "a/5.png, size unknown" in out and "in training: not used: no image file" in out


def test_a_system_prompt_and_ignored_keys(data_set, tokenizer_folder, command, capsys):
    items = json.loads(data_set[0].read_text())
    items[3] |= {"system": "Be brief.", "foo": 1}
    data_set[0].write_text(json.dumps(items))
    arguments = (data_set[0], "--index", 3, "--image_root", data_set[1])
    command(show_record, *arguments, "--tokenizer", tokenizer_folder, "--template", "chatml")
    out = capsys.readouterr().out
    assert "<|im_start|>system\nBe brief.<|im_end|>" in out and "ignored keys: 'foo'" in out


def test_errors(data_set, tokenizer_folder, tmp_path, command):
    arguments = (data_set[0], "--image_root", data_set[1])
    with pytest.raises(LlavaError, match="data.json has no record 24: its records are 0 to 23"):
        command(show_record, *arguments, "--index", 24, "--tokenizer", tokenizer_folder)
    with pytest.raises(LlavaError, match="no tokenizer folder at"):
        command(show_record, *arguments, "--index", 0, "--tokenizer", tmp_path / "no")
    data_set[0].write_text('[{"id": "x", "conversations": []}]')
    with pytest.raises(LlavaError, match=r"data.json: record 0 \(id 'x'\)"):
        command(show_record, *arguments, "--index", 0, "--tokenizer", tokenizer_folder)


def test_independent_turns(data_set, tokenizers):
    """Of each question the text has what it adds; the marks are at the answers."""
    spec = ImageSpec(28)
    row_format = RowFormat(get_template("v1"), spec, 3, 99, 2, turns="independent")
    records = open_records(*data_set)
    shown = show(records, 6, row_format, tokenizers["smollm"])
    questions = [turn.text for turn in records[6].turns[::2]]
    assert len(questions) == 2 and shown["text"].count("<image>") == 1
    text = shown["text"]
    answers = [text[start:end].strip() for start, end in shown["supervised_spans"]]
    assert answers == ["blue blue </s>", "yes</s>"]
    assert text.count("USER: ") == 1 and "What?" in text and "and 你好?" in text
    ids, turn_ids = np.array(shown["input_ids"]), np.array(shown["turn_ids"])
    assert set(turn_ids) == {0, 1, 2} and shown["position_ids"][-1] < len(ids) - 1
    decoded = tokenizers["smollm"].decode(ids[turn_ids == 2])
    assert text.endswith(decoded)
