"""Logs that read after a resume as if the run had never stopped."""

import json
import threading

import pytest

from llava_jax.training.metrics import MetricsLog, drop_later_lines, plot_losses, read_log


def write(path, *steps, end="\n"):
    path.write_text("".join(json.dumps({"step": s, "loss": 1 / s}) + "\n" for s in steps) + end)


def test_later_lines_and_a_cut_last_line_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, 1, 2, 3, end='{"step": 4, "lo')
    assert [line["step"] for line in read_log(path)] == [1, 2, 3]
    drop_later_lines(path, 2)
    assert path.read_text() == '{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 0.5}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_line_cut_before_its_end_of_line_is_dropped_though_it_parses(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, 1, 2, end="")
    path.write_text(path.read_text().rstrip("\n"))
    drop_later_lines(path, 5)
    assert [line["step"] for line in read_log(path)] == [1]


def test_kept_lines_keep_their_bytes(tmp_path):
    """Floats to the last digit, and text as it was written."""
    path = tmp_path / "samples.jsonl"
    text = '{"step": 1, "loss": 0.1234567890123456, "answer": "你好\u2028 \\n"}\n'
    path.write_text(text, encoding="utf-8")
    drop_later_lines(path, 1)
    assert path.read_text(encoding="utf-8") == text


def test_a_line_cut_within_a_character_is_dropped(tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "answer": "' + "你".encode()[:2])
    drop_later_lines(path, 9)
    assert path.read_bytes() == b'{"step": 1}\n'


@pytest.mark.parametrize("damage", [b"\0" * 9, b"[1]", b'{"loss": 1}', b"\xff", b""])
def test_a_line_that_a_crash_damaged_is_left_out_and_reported(damage, tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + damage + b'\n{"step": 2}\n{"step": 3}\n')
    assert [line["step"] for line in read_log(path)] == [1, 2, 3]
    drop_later_lines(path, 2)
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'
    assert f"{path}: 1 of 4 lines are damaged and left out" in capsys.readouterr().err


def test_no_log_is_no_error(tmp_path):
    drop_later_lines(tmp_path / "none.jsonl", 3)
    assert not list(tmp_path.iterdir())


def test_a_log_goes_on_after_a_resume(tmp_path):
    for start, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        log = MetricsLog(tmp_path, start, "", {})
        for step in steps:
            log.scalars(step, {"loss": step + start / 10, "learning_rate/projector": 1e-3})
            log.sample(step, {"id": "a", "question": "What?", "prediction": "你好"})
        log.close()
    lines = read_log(tmp_path / "metrics.jsonl")
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1), (2, 2), (3, 3.2), (4, 4.2)]
    samples = read_log(tmp_path / "samples.jsonl")
    assert [s["step"] for s in samples] == [1, 2, 3, 4] and samples[0]["prediction"] == "你好"
    assert list((tmp_path / "tensorboard").iterdir())
    plot_losses(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes()[1:4] == b"PNG"


def test_a_full_disk_is_an_error_of_tensorboard_s_file_too(tmp_path):
    """And no hang: a writer in a thread would end unseen, and its queue be full for ever."""
    threads = threading.active_count()
    log = MetricsLog(tmp_path, 0, "", {})
    assert threading.active_count() == threads
    log._events._writer._py_recordio_writer._writer = open("/dev/full", "wb")
    with pytest.raises(OSError, match="No space left"):
        log.scalars(1, {"loss": 1.0})
