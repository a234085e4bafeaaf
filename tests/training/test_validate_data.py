"""The command `llava-jax validate` without and with a recipe."""

import json

import pytest

from llava_jax.training import validate_data


def test_a_sound_set(data_set, command, capsys):
    assert command(validate_data, data_set[0], "--image_root", data_set[1]) == 0
    out = capsys.readouterr().out
    assert "24 records, 24 image files" in out and "no faults" in out


@pytest.fixture
def faulty_set(data_set):
    path, root = data_set
    items = json.loads(path.read_text())
    for index in (1, 2, 3, 5):
        items[index]["conversations"][0]["from"] = "robot"
    items[4]["conversations"] = []
    items[6]["image"] = "../6.png"
    items[7]["conversations"][0]["value"] += "<image>"
    (root / "a/9.png").unlink()
    (root / "a/10.png").write_bytes((root / "a/10.png").read_bytes()[:-50])
    (root / "a/11.png").write_text("<html>")
    items[12]["id"] = items[13]["id"] = "r14"
    items[17]["conversations"][0]["value"] += " <|im_end|>"
    items[18]["conversations"][0]["value"] += " why" * 100
    items[19]["conversations"][1]["value"] += " so" * 100
    path.write_text(json.dumps(items))
    return data_set


def test_every_fault_is_counted_and_named(faulty_set, tokenizer_folder, command, capsys):
    arguments = (faulty_set[0], "--image_root", faulty_set[1])
    more = ("--tokenizer", tokenizer_folder, "--template", "chatml", "--max_length", 120)
    assert command(validate_data, *arguments, *more, "--image_tokens", 4) == 1
    captured = capsys.readouterr()
    out = captured.out
    expected = {
        "unknown role": (4, "record 1 (id 'r1'), turn 0"),
        "no conversations": (1, "record 4"),
        "image outside the root": (1, "'../6.png'"),
        "<image> count": (1, "record 7 (id 'r7') has 2 <image>"),
        "missing image": (1, "record 9 (id 'r9')"),
        "unreadable image": (1, "record 10 (id 'r10'): image 'a/10.png' is broken or truncated"),
        "not an image": (1, "record 11 (id 'r11'): 'a/11.png' is not an image"),
        "repeated id": (2, "records 12 and 13 have the same id 'r14'"),
        "special token in the text": (1, "record 17 (id 'r17'), turn 0: '<|im_end|>'"),
        "left out when training: no supervised token is left at max_length=120": (1, "record 18"),
        "cut when training at max_length=120": (1, "record 19"),
    }
    for kind, (count, culprit) in expected.items():
        assert f"{count:>10}  {kind}\n" in out and culprit in out, kind
    assert "faults: 10" in out and "notes: 5" in out
    assert "… and 1 more" in out  # only three of the four unknown roles are printed
    assert "tokens a record: min" in out and ">120" in out and "█" in out
    assert "checking images" in captured.err


def test_max_pixels(data_set, command, capsys):
    assert (
        command(validate_data, data_set[0], "--image_root", data_set[1], "--max_pixels", 900) == 1
    )
    assert "image too large" in capsys.readouterr().out
