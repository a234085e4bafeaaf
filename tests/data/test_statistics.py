"""Lengths, writing systems and answers of a data set."""

import json

import pytest

from llava_jax.data.records import open_records
from llava_jax.data.statistics import Distribution, Texts, bars, script
from tests.data.conftest import record


def test_a_distribution_counts_every_value():
    lengths = Distribution("tokens", [1, 5, 5, 9, 50, 99, 100, 101, 300], 100)
    *bins, over = lengths.bins()
    assert sum(count for _, count in bins) == 7 and over == (">100", 2)
    assert "max 300, sum 670" in lengths.summary()
    assert bars(lengths.bins())[-1].endswith(" 2") and len(bars(lengths.bins())) == 13
    assert Distribution("few", [1, 1, 3]).bins() == [("1", 2), ("2", 0), ("3", 1)]
    assert Distribution("one", [4], 100).bins() == [("4", 1)]
    assert Distribution("long", [200, 300], 100).bins() == [("100", 0), (">100", 2)]


@pytest.mark.parametrize("letter, name", [
    ("a", "Latin"), ("é", "Latin"), ("ж", "Cyrillic"), ("你", "Han"), ("か", "Hiragana"),
    ("カ", "Katakana"), ("ｶ", "Katakana"), ("Ａ", "Latin"), ("한", "Hangul"), ("ض", "Arabic"),
    ("न", "Devanagari"), ("1", ""), (" ", ""), ("?", ""), ("\ud800", ""),
])  # fmt: skip
def test_writing_systems(letter, name):
    assert script(letter) == name


def texts_of(tmp_path, answers, tokenizer=None):
    items = [record(i, "Да или нет?", answer) for i, answer in enumerate(answers)]
    path = tmp_path / "d.json"
    path.write_text(json.dumps(items))
    records, texts = open_records(path), Texts(tokenizer)
    for one in records:
        texts.add(one)
    return records, texts


def test_answers_that_repeat_are_seen(tmp_path):
    answers = ["Yes"] * 40 + ["yes."] * 5 + ["no"] * 30 + [f"word {i}" for i in range(25)]
    records, texts = texts_of(tmp_path, answers)
    common = texts.common(records)
    assert [(one.text, one.count, one.share) for one in common] == [
        ("Yes", 45, 0.45), ("no", 30, 0.3)
    ]  # fmt: skip
    lines = "\n".join(texts.lines(records))
    assert "100 answers, 27 different; most common:" in lines and "45.0%  'Yes'" in lines
    assert "Cyrillic" in lines and "Latin" in lines and "(100 records)" in lines


def test_answers_that_differ_and_no_records(tmp_path):
    records, texts = texts_of(tmp_path, ["one", "two"])
    assert texts.common(records) == [] and "most common" not in str(texts.lines(records))
    assert Texts().lines([]) == [] and Texts().distributions() == []


def test_lengths_of_answers_and_conversations(tmp_path, tokenizers):
    tokenizer = tokenizers["smollm"]
    answers = ["blue", "a blue sky " * 30, "no", ""]
    _, texts = texts_of(tmp_path, answers, tokenizer)
    tokens, questions = texts.distributions()
    wanted = [len(tokenizer(text, add_special_tokens=False).input_ids) for text in answers[:2]]
    assert list(tokens.values)[:2] == wanted and tokens.values[3] == 0
    assert list(questions.values) == [1, 1, 1, 1]
