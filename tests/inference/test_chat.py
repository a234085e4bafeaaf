"""`llava-jax chat`: one answer, the loop, and errors."""

import argparse
import io
import sys

import pytest

from llava_jax.errors import LlavaError
from llava_jax.inference import chat
from llava_jax.inference.model import Llava
from tests.tiny_model import random_image


class Recorder:
    """Stands for a model: answers with a number and remembers what it was asked."""

    def __init__(self):
        self.calls = []

    def stream_chat(self, question, images, history, **settings):
        self.calls.append((question, list(images), list(history), settings))
        if "fail" in question:
            raise LlavaError("too long")
        yield "answer "
        yield str(len(self.calls))


@pytest.fixture
def model(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(Llava, "from_pretrained", lambda *_, **__: recorder)
    return recorder


@pytest.fixture
def pictures(tmp_path):
    paths = [str(tmp_path / f"{i}.png") for i in range(2)]
    for i, path in enumerate(paths):
        random_image(i).save(path)
    return paths


def run(*arguments, lines=None, monkeypatch=None):
    parser = argparse.ArgumentParser()
    chat.add_arguments(parser)
    if lines is not None:
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    return chat.main(parser.parse_args([*arguments]))


def test_prompt_prints_only_the_answer(model, pictures, tmp_path, capsys):
    arguments = ["--checkpoint", str(tmp_path), "--image", pictures[0], "--image", pictures[1]]
    code = run(*arguments, "--prompt", "Which?", "--max_new_tokens", "7", "--temperature", "0.5")
    assert code == 0 and capsys.readouterr().out == "answer 1\n"
    question, images, history, settings = model.calls[0]
    assert question == "<image>\n<image>\nWhich?" and images == pictures and history == []
    assert settings == {"max_new_tokens": 7, "temperature": 0.5, "top_p": 1.0, "seed": 0}


def test_conversation_keeps_turns_and_pictures(model, pictures, tmp_path, capsys, monkeypatch):
    lines = [
        "One?", "", f"/image {pictures[1]}", "Two <image>?", "fail", "/nonsense",
        "/image no/such.png", "Three?", "/reset", "Four?", "/quit", "Five?",
    ]  # fmt: skip
    arguments = ["--checkpoint", str(tmp_path), "--image", pictures[0]]
    assert run(*arguments, lines=lines, monkeypatch=monkeypatch) == 0
    one, two = ("<image>\nOne?", "answer 1"), ("<image>\nTwo ?", "answer 2")
    assert [call[:3] for call in model.calls] == [
        ("<image>\nOne?", pictures[:1], []),
        ("<image>\nTwo ?", pictures, [one]),
        ("fail", pictures, [one, two]),
        ("Three?", pictures, [one, two]),
        ("Four?", [], []),
    ]
    out, err = capsys.readouterr()
    assert out == "answer 1\nanswer 2\nanswer 4\nanswer 5\n"
    assert "error: too long" in err and "unknown command /nonsense" in err
    assert "no/such.png" in err


def test_end_of_input_ends_the_conversation(model, tmp_path, monkeypatch):
    assert run("--checkpoint", str(tmp_path), lines=["Hi"], monkeypatch=monkeypatch) == 0
    assert len(model.calls) == 1


def test_wrong_paths_are_told_before_the_model_loads(tmp_path):
    with pytest.raises(LlavaError, match="no/such.png"):
        run("--checkpoint", str(tmp_path), "--image", "no/such.png")
    with pytest.raises(LlavaError, match="no checkpoint folder at no/such"):
        run("--checkpoint", "no/such", "--prompt", "Hi")
