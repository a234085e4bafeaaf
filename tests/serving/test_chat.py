"""`llava-jax chat`: one answer, the loop, and errors."""

import argparse
import dataclasses
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from llava_jax.data import video
from llava_jax.data.boxes import Boxes, draw_boxes
from llava_jax.data.media import load_image
from llava_jax.data.video import Video
from llava_jax.errors import LlavaError
from llava_jax.inference.model import Llava
from llava_jax.models.anyres import Tiling
from llava_jax.models.images import ImageSpec
from llava_jax.models.video import VideoSpec
from llava_jax.serving import chat, command_line
from tests.tiny_model import CONFIG, random_image


class Recorder:
    """Stands for a model: answers with a number and remembers what it was asked."""

    def __init__(self):
        self.calls, self.boxes, self.config = [], Boxes(), CONFIG

    def describe_stops(self):
        return "</s>"

    def explain(self, question, images, answer, **options):
        pictures = [image.tobytes() for image in images]
        self.explained = (question, pictures, answer, options)
        return SimpleNamespace(save=lambda path: Path(path).write_text(answer))

    def stream_chat(self, question, images, history, **settings):
        pictures = [image.tobytes() for image in images]
        self.calls.append((question, pictures, list(history), settings))
        if "fail" in question:
            raise LlavaError("too long")
        yield "answer "
        yield "[0.5, 0.25, 1, 0.75]" if "where" in question else str(len(self.calls))


@pytest.fixture
def model(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(Llava, "from_pretrained", lambda *_, **__: recorder)
    monkeypatch.setattr(command_line, "keep_compilations", lambda: None)
    return recorder


@pytest.fixture
def pictures(tmp_path):
    paths = [str(tmp_path / f"{i}.png") for i in range(2)]
    for i, path in enumerate(paths):
        random_image(i).save(path)
    return paths


def shown(paths) -> list[bytes]:
    return [load_image(path).tobytes() for path in paths]


def run(*arguments, lines=None, monkeypatch=None):
    parser = argparse.ArgumentParser()
    chat.add_arguments(parser)
    if lines is not None:
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    return chat.main(parser.parse_args([*arguments]))


def test_prompt_prints_only_the_answer(model, pictures, tmp_path, capsys):
    arguments = ["--checkpoint", str(tmp_path), "--image", pictures[0], "--image", pictures[1]]
    arguments += ["--prompt", "Which?", "--contrast", "blur", "--contrast_beta", "0.2"]
    code = run(*arguments, "--max_new_tokens", "7", "--temperature", "0.5")
    assert code == 0 and capsys.readouterr().out == "answer 1\n"
    question, images, history, settings = model.calls[0]
    assert question == "<image>\n<image>\nWhich?" and images == shown(pictures) and history == []
    contrast = {"contrast": "blur", "contrast_alpha": 1.0, "contrast_beta": 0.2}
    sampling = {"max_new_tokens": 7, "temperature": 0.5, "top_p": 1.0, "seed": 0}
    assert settings == sampling | contrast


def test_the_last_answer_is_explained(model, pictures, tmp_path, capsys, monkeypatch):
    out = tmp_path / "where.png"
    lines = [f"/explain {out}", "One?", "Two?", f"/image {pictures[1]}", f"/explain {out}"]
    arguments = ["--checkpoint", str(tmp_path), "--image", pictures[0], "--system", "Be brief."]
    assert run(*arguments, lines=lines, monkeypatch=monkeypatch) == 0
    history = [("<image>\nOne?", "answer 1")]
    options = {"history": history, "system": "Be brief."}
    assert model.explained == ("Two?", shown(pictures[:1]), "answer 2", options)
    assert out.read_text() == "answer 2" and "nothing was asked yet" in capsys.readouterr().err


def test_conversation_keeps_turns_and_pictures(model, pictures, tmp_path, capsys, monkeypatch):
    lines = [
        "One?", "", f"/image {pictures[1]}", "Two <image>?", "fail", "/nonsense",
        "/image no/such.png", "Three?", "/reset", "Four?", "/quit", "Five?",
    ]  # fmt: skip
    arguments = ["--checkpoint", str(tmp_path), "--image", pictures[0]]
    assert run(*arguments, lines=lines, monkeypatch=monkeypatch) == 0
    one, two = ("<image>\nOne?", "answer 1"), ("<image>\nTwo ?", "answer 2")
    assert [call[:3] for call in model.calls] == [
        ("<image>\nOne?", shown(pictures[:1]), []),
        ("<image>\nTwo ?", shown(pictures), [one]),
        ("fail", shown(pictures), [one, two]),
        ("Three?", shown(pictures), [one, two]),
        ("Four?", [], []),
    ]
    out, err = capsys.readouterr()
    assert out == "answer 1\nanswer 2\nanswer 4\nanswer 5\n"
    assert (
        "llava-jax chat: too long" in err
        and "answers end at </s>" in err
        and "unknown command /nonsense" in err
    )
    assert "no/such.png" in err


def test_a_picture_is_shown_with_what_it_takes():
    tiling = Tiling(one_view=True)
    tiled = dataclasses.replace(CONFIG, image=ImageSpec(8, "anyres", tiling=tiling))
    words = chat.picture_words(tiled, [(40, 40)])
    assert words == ["picture 1: 40x40 pixels, 2x2 tiles and the whole, 24 tokens"]
    words = chat.picture_words(tiled, [(40, 40), (30, 20)])
    assert words == [f"picture {i} pixels, one tile, 5 tokens" for i in ("1: 40x40", "2: 30x20")]


def test_a_saved_conversation_is_a_llava_record(model, pictures, tmp_path, capsys, monkeypatch):
    path = tmp_path / "talk.json"
    lines = [f"/save {path}", "One?", f"/image {pictures[1]}", f"/save {path}", "/save no/such/x"]
    arguments = ["--checkpoint", str(tmp_path), "--image", pictures[0]]
    assert run(*arguments, lines=lines, monkeypatch=monkeypatch) == 0
    (record,) = json.loads(path.read_text())
    assert record == {
        "id": "talk",
        "image": pictures[:1],  # the second was in no question yet
        "conversations": [
            {"from": "human", "value": "<image>\nOne?"},
            {"from": "gpt", "value": "answer 1"},
        ],
    }
    err = capsys.readouterr().err
    assert "nothing was said yet" in err and "cannot write 'no/such/x'" in err


def test_boxes_are_drawn_on_the_picture_they_are_about(
    model, pictures, tmp_path, capsys, monkeypatch
):
    path = tmp_path / "boxes.png"
    lines = [
        f"/boxes {path}", "where?", f"/image {pictures[1]}", f"/boxes {path}", "/boxes no/such.png",
        f"/boxes {tmp_path}/picture.text", "which?", f"/boxes {path}.png", "/reset", "where?",
        f"/boxes {path}.png",
    ]  # fmt: skip
    arguments = ["--checkpoint", str(tmp_path), "--image", pictures[0]]
    assert run(*arguments, lines=lines, monkeypatch=monkeypatch) == 0
    shown = load_image(pictures[0])  # 11 x 9: the second was in no question yet
    expected = draw_boxes(shown, Boxes().read("[0.5, 0.25, 1, 0.75]", (11, 9)), "red")
    assert load_image(str(path)).tobytes() == expected.tobytes() != shown.tobytes()
    err = capsys.readouterr().err
    assert err.count("the last answer has no box") == 2 and "no picture was shown" in err
    assert "cannot write 'no/such.png'" in err and "picture.text': unknown file extension" in err
    assert not (tmp_path / "boxes.png.png").exists()


def test_paths_begin_at_home_where_they_say_so(model, pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    lines = ["/image ~/0.png", "One?", "/save ~/talk.json"]
    assert run("--checkpoint", str(tmp_path), lines=lines, monkeypatch=monkeypatch) == 0
    assert model.calls[0][:2] == ("<image>\nOne?", shown(pictures[:1]))
    assert (tmp_path / "talk.json").exists()


def test_a_byte_that_is_no_utf8_is_a_fault_of_its_line_alone(model, tmp_path, capsys, monkeypatch):
    typed = io.BytesIO(b"One?\ncaf\xe9 fail\nTwo?\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(typed, encoding="utf-8"))
    assert run("--checkpoint", str(tmp_path)) == 0
    assert [call[0] for call in model.calls] == ["One?", "caf\udce9 fail", "Two?"]
    assert capsys.readouterr().out == "answer 1\nanswer 3\n"


def test_end_of_input_ends_the_conversation(model, tmp_path, monkeypatch):
    assert run("--checkpoint", str(tmp_path), lines=["Hi"], monkeypatch=monkeypatch) == 0
    assert len(model.calls) == 1


def test_wrong_settings_are_reported_before_the_model_loads(tmp_path):
    with pytest.raises(LlavaError, match="max_tokens must be a whole number from 1, not 0"):
        run("--checkpoint", "no/such", "--max_new_tokens", "0")


def test_wrong_paths_are_reported_before_the_model_loads(tmp_path):
    with pytest.raises(LlavaError, match="no/such.png"):
        run("--checkpoint", str(tmp_path), "--image", "no/such.png")
    with pytest.raises(LlavaError, match="no checkpoint folder at no/such/run"):
        run("--checkpoint", "no/such/run", "--prompt", "Hi")
    with pytest.raises(LlavaError, match="no/such is no folder here, and the Hugging Face hub"):
        run("--checkpoint", "no/such", "--prompt", "Hi")


def test_a_video_is_shown_and_saved_as_a_record(model, pictures, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "frames"
    folder.mkdir()
    random_image(0).save(folder / "0.png")
    asked = []
    monkeypatch.setattr(
        model, "stream_chat", lambda q, images, *_, **__: asked.append((q, images)) or iter("a")
    )
    inspected, inspect = [], video.inspect_video
    inspecting = lambda one, *args: inspected.append(one.source) or inspect(one, *args)
    monkeypatch.setattr(video, "inspect_video", inspecting)
    monkeypatch.setattr(chat, "inspect_video", inspecting)
    spec = ImageSpec(8, "resize", video=VideoSpec(frames=3))
    model.config = dataclasses.replace(CONFIG, image=spec)
    lines = [f"/video {folder}", "What <video>?", "/video none.mp4", f"/save {tmp_path / 's.json'}"]
    arguments = ["--checkpoint", str(tmp_path), "--image", pictures[0], "--video", str(folder)]
    run(*arguments, lines=lines, monkeypatch=monkeypatch)
    ((question, images),) = asked
    assert question == "<image>\n<image>\n<image>\nWhat ?"
    assert [isinstance(image, Video) for image in images] == [False, True, True]
    errors = capsys.readouterr().err
    assert "no video file 'none.mp4'" in errors
    # On the command line before the model is loaded and after it; then once each.
    assert inspected == [str(folder)] * 3 + ["none.mp4"]
    assert errors.startswith("picture 1: 11x9 pixels, one tile, 4 tokens\nvideo: 11x9 pixels, 1 f")
    assert errors.count("video: 11x9 pixels, 1 frames, 2 tokens\n") == 2
    (record,) = json.loads((tmp_path / "s.json").read_text())
    assert record["image"] == pictures[:1] and record["video"] == [str(folder)] * 2
    assert record["conversations"][0]["value"] == "<image>\n<video>\n<video>\nWhat ?"


def test_a_model_without_videos_keeps_none_waiting(model, tmp_path, capsys, monkeypatch):
    random_image(0).save(tmp_path / "0.png")
    lines = [f"/video {tmp_path}", "What?"]
    run("--checkpoint", str(tmp_path), lines=lines, monkeypatch=monkeypatch)
    assert "the model takes pictures, not videos" in capsys.readouterr().err
    assert model.calls[0][:2] == ("What?", [])
    given = ("--checkpoint", str(tmp_path), "--video", str(tmp_path))
    with pytest.raises(LlavaError, match="the model takes pictures, not videos"):
        run(*given, lines=["What?"], monkeypatch=monkeypatch)
    assert len(model.calls) == 1
