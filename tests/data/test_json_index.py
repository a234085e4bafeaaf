"""Records that stay in their JSON or JSONL file are those that a parser of the whole file finds."""

import hashlib
import json
import pickle
import random

import pytest

from llava_jax.data import chunks, json_index
from llava_jax.data.records import open_records
from llava_jax.data.stored import File
from llava_jax.errors import LlavaError
from tests.data.conftest import record

TEXTS = ["", "a", "你好", "é" * 50, '"\\\n\t', "{[,]}", "\u2028", "🙂", "x" * 300, "-1e5", "null"]


def value(choose, depth=0):
    """A random JSON value."""
    kind = choose.randrange(7 if depth < 3 else 5)
    if kind < 5:
        numbers = [choose.randrange(-999, 10**6), choose.random(), 1e300]
        return choose.choice([*numbers, True, None, *[choose.choice(TEXTS)] * 9])
    values = [value(choose, depth + 1) for _ in range(choose.randrange(4))]
    return values if kind == 5 else {choose.choice(TEXTS): one for one in values}


def spread(text, choose):
    """JSON with white space around its brackets and commas outside of strings."""
    found, inside, escaped = [], False, False
    for letter in text:
        if letter == '"' and not escaped:
            inside = not inside
        escaped = letter == "\\" and not escaped
        space = lambda: choose.choice(["", "", " ", "\n ", "\t\r\n"])
        found.append(letter if inside or letter not in "[]{}," else f"{space()}{letter}{space()}")
    return "".join(found)


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
@pytest.mark.parametrize("block", [1, 7, 64, 1 << 20])
def test_the_values_of_a_file_are_found(tmp_path, monkeypatch, suffix, block):
    monkeypatch.setattr(json_index, "_BLOCK", block)
    choose = random.Random(block)
    for trial in range(40):
        items = [value(choose) for _ in range(choose.randrange(1, 20))]
        ascii_only = choose.random() < 0.3
        texts = [json.dumps(item, ensure_ascii=ascii_only) for item in items]
        if suffix == "json":
            text = spread(f"[{','.join(texts)}]", choose) + choose.choice(["", "\n"])
        else:
            blank = lambda: choose.choice(["", "\n", " \n\t\n"])
            end = choose.choice(["", "\n", "\r\n"])
            text = "".join(f"{blank()}{choose.choice(['', ' '])}{one}\n" for one in texts)
            text = text.rstrip("\n") + end
        path = tmp_path / f"{trial}.{suffix}"
        mark = choose.choice(["", "\ufeff"])
        path.write_bytes((mark + text).encode())
        records = open_records(path)
        found = [records.item(i) for i in range(len(records))]
        assert found == items, text
        assert [pickle.loads(pickle.dumps(records)).item(i) for i in range(len(items))] == items


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
@pytest.mark.parametrize("count", [1, 3, 4, 8, 9])
def test_one_reading_gives_the_hashes_of_the_file_and_of_its_chunks(
    tmp_path, monkeypatch, suffix, count
):
    """A chunk's is that of its bytes, without what separates it from the next."""
    monkeypatch.setattr(chunks, "SIZE", 4)
    path = tmp_path / f"d.{suffix}"
    texts = [json.dumps(record(i)).encode() for i in range(count)]
    ends = (b" [ ", b" ,\n", b"\n]\n") if suffix == "json" else (b"", b"\r\n", b"\n")
    path.write_bytes(ends[0] + ends[1].join(texts) + ends[2])
    monkeypatch.setattr(File, "read", lambda *arguments: pytest.fail("read again"))
    index = json_index.index_of(File.of(path), "d", lambda item: False, None)
    sha = lambda data: hashlib.sha256(data).hexdigest()
    assert index.content == sha(path.read_bytes())
    assert index.chunks == [sha(ends[1].join(texts[i : i + 4])) for i in range(0, count, 4)]


BROKEN = [
    '[{"a": 1} {"b": 2}]', '[{"a": 1},]', '[{"a": 1}', '[{"a": tru}]', '[{"a": "x]', "[1] 2", "3",
    '[{"a": 1}, {"b": 02}]', '[{"a": "\x01"}]', '{"a": 1}', "", " ", "[,]", "nul", "[[[1]]",
    '[{"a": "\\ud8"}]', '[{"a": 1}]]', '{"a": [1]}\n{"b": 1}', '[{"a" 1}]',
]  # fmt: skip


@pytest.mark.parametrize("block", [3, 1 << 20])
@pytest.mark.parametrize("text", BROKEN)
def test_a_broken_file_is_refused_with_what_json_says(tmp_path, monkeypatch, block, text):
    monkeypatch.setattr(json_index, "_BLOCK", block)
    path = tmp_path / "d.json"
    path.write_text(text)
    try:
        whole, words = json.loads(text), "must hold a JSON list of records, not"
        assert not isinstance(whole, list)
    except json.JSONDecodeError as error:
        words = f"{error.msg} at line {error.lineno} column {error.colno}"
    with pytest.raises(LlavaError) as caught:
        open_records(path)
    assert words in str(caught.value) and str(path) in str(caught.value)


def test_the_index_of_a_large_file_is_made_once_and_anew_for_another(tmp_path, monkeypatch):
    path, cache = tmp_path / "d.json", tmp_path / "cache"
    path.write_text(json.dumps([record(i) for i in range(9)]))
    assert len(open_records(path, cache_dir=cache)) == 9 and not cache.exists()  # a small one
    monkeypatch.setattr(json_index, "_KEPT_FROM", 0)
    first = open_records(path, cache_dir=cache)
    (kept,) = cache.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(json_index, "_made", lambda *args: pytest.fail("read again"))
        again = open_records(path, cache_dir=cache)
    assert again.fingerprint() == first.fingerprint() and again.chunks() == first.chunks()
    whole = kept.read_bytes()
    for broken in (b"", whole[: len(whole) // 2], b"x" * len(whole)):
        kept.write_bytes(broken)
        assert [one.id for one in open_records(path, cache_dir=cache)] == [str(i) for i in range(9)]
    path.write_text(json.dumps([record(i) for i in range(5)]))
    assert len(open_records(path, cache_dir=cache)) == 5


def test_a_file_that_changes_during_a_run_is_noticed(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(json.dumps(record(i)) for i in range(9)))
    records = open_records(path)
    path.write_text("\n".join(json.dumps(record(i)) for i in range(8)))
    with pytest.raises(LlavaError, match="d.jsonl was changed after it was opened"):
        [records[i] for i in range(9)]
