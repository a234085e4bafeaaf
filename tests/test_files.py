"""What is promised of output files: one writer at a time, whole or not at all, never another's."""

import errno
import json
import os

import pytest

from llava_jax.errors import LlavaError
from llava_jax.files import claim, json_line, lock, locked, whole_file, write_json, write_records


@pytest.mark.parametrize("name", ["a folder", "a file"])
def test_one_program_at_a_time(tmp_path, name):
    path = tmp_path if name == "a folder" else tmp_path / ".lock"
    with locked(path, "busy"):
        with pytest.raises(LlavaError, match="^busy$"), locked(path, "busy"):
            pass
    with locked(path, "busy"):
        pass


def test_a_lock_ends_when_its_file_is_closed(tmp_path):
    path = tmp_path / "answers.jsonl"
    with open(path, "ab") as file, open(path, "ab") as other:
        lock(file, path, "busy")
        with pytest.raises(LlavaError):
            lock(other, path, "busy")
        file.close()
        lock(other, path, "busy")


def test_a_file_system_without_locks_is_reported(tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)
    with locked(tmp_path, "busy"):
        pass
    expected = f"the file system of {tmp_path} has no locks (Function not implemented)"
    assert expected in capsys.readouterr().err


def test_a_file_changes_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), whole_file(path) as file:
        file.write(b"half of the ne")
        file.flush()
        raise RuntimeError
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]
    with whole_file(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["file"]


def test_json_is_utf8_and_keeps_half_characters(tmp_path, monkeypatch):
    value = {"text": "größer \ud83d", "name": os.fsdecode(b"caf\xe9")}
    write_json(tmp_path / "value.json", value)
    content = (tmp_path / "value.json").read_bytes()
    assert "größer".encode() in content and json.loads(content) == value
    assert json.loads(json_line(value)) == value and json_line(value).endswith(b"\n")


@pytest.mark.parametrize("records", [[], [{"id": "ä"}], [{"id": 0}, {"id": 1}, {"id": 2}]])
def test_records_are_written_a_line_each(tmp_path, records):
    write_records(tmp_path / "a.json", records)
    write_records(tmp_path / "a.jsonl", records)
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == records and len(text.splitlines()) == len(records) + 2
    lines = (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()
    assert list(map(json.loads, lines)) == records


def test_results_of_another_run_are_kept(tmp_path):
    mark, output = tmp_path / "run.json", tmp_path / "answers.jsonl"
    run = {"model": "a", "dtype": "float32"}
    claim(mark, run, output)
    output.touch()
    claim(mark, run | {"model": "b"}, output)  # empty: there is nothing to lose
    output.write_text("{}\n")
    claim(mark, run | {"model": "b"}, output)
    with pytest.raises(LlavaError, match=r"answers of another run \(different: model\)"):
        claim(mark, run, output)
    assert json.loads(mark.read_text())["model"] == "b"


@pytest.mark.parametrize("content", [None, "{", "[]", '"text"'])
def test_results_with_a_damaged_mark_are_another_runs(tmp_path, content):
    mark, output = tmp_path / "run.json", tmp_path / "answers.jsonl"
    output.write_text("{}\n")
    if content is not None:
        mark.write_text(content)
    with pytest.raises(LlavaError, match=r"different: model\)"):
        claim(mark, {"model": "a"}, output)
