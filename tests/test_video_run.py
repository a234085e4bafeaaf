"""A stage that learns from videos, its run asked about them, and the same by the command line."""

import json

import numpy as np
import pytest

from llava_jax import Llava, Video
from llava_jax.evaluation import load_benchmark
from llava_jax.evaluation.runner import evaluate
from llava_jax.evaluation.videos import MVBENCH
from llava_jax.serving import generate
from llava_jax.weights.load import load_run
from llava_jax.weights.run_directory import checkpoint_of, read_run_model
from tests.evaluation.published import write
from tests.tiny_run import conversation, instruct
from tests.videos import frame

STAGE = {
    "model.image_mode": "resize",
    "model.video.newline": "frame",
    "model.video.frames": 4,
    "model.video.time_instruction": True,
    "data.video_frames": 3,
    "data.video_fps": 1.0,
    "data.max_length": 512,
    "data.images_per_row": 8,
    "trainable": {"projector": 1e-3, "projector/newline": 1e-2, "decoder": 1e-3},
    "steps": 2,
}


@pytest.fixture(scope="module")
def data(world, tmp_path_factory) -> dict:
    """Records of a video, of a picture and a video, of pictures, and of none."""
    folder = tmp_path_factory.mktemp("videos")
    records = [conversation(i) for i in range(12)]
    for i, record in enumerate(records):
        clip = folder / "images" / f"clip{i}"
        clip.mkdir(parents=True)
        for number in range(2 + i):
            frame(number, (12, 9)).save(clip / f"{number}.png")
        frame(i, (10, 10)).save(folder / f"images/{i}.png")
        if i % 3 == 1:
            record["video"] = f"clip{i}"
            record["conversations"][0]["value"] = "<image>\nWhat happens?"
        if i % 6 == 0:
            record["video"] = [f"clip{i}"]
            record["conversations"][0]["value"] = "<image> <video> How so?"
    (folder / "videos.json").write_text(json.dumps(records))
    places = {"data.train": folder / "videos.json", "data.image_root": folder / "images"}
    return {name: str(path) for name, path in places.items()}


@pytest.fixture(scope="module")
def trained(world, run, aligned, data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("video") / "instruct"
    held_out = {"data.validation": data["data.train"], "samples": 3, "validate_every": 2}
    run(instruct(world, workdir, aligned, STAGE | data | held_out))
    return workdir


def test_a_stage_learns_from_videos(trained, aligned):
    video = read_run_model(trained).config.image.video
    assert (video.newline, video.frames, video.fps) == ("frame", 4, 0.0)
    newline = np.asarray(load_run(checkpoint_of(trained))[1]["projector"]["newline"])
    assert newline.shape == (32,) and newline.any()
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 2 and np.isfinite(losses).all()


def test_its_run_is_asked_about_videos(trained, data, tmp_path):
    model = Llava.from_pretrained(trained)
    clip = f"{data['data.image_root']}/clip9"
    answer = model.chat("What happens?", Video(clip), max_tokens=6, ignore_eos=True)
    prompts = [{"prompt": "What happens?", "video": "clip9"}, {"prompt": "?", "video": "none"}]
    (tmp_path / "ask.jsonl").write_text("".join(json.dumps(p) + "\n" for p in prompts))
    arguments = generate_arguments(trained, tmp_path, data["data.image_root"])
    generate.main(arguments)
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert lines[0]["text"] == answer and lines[0]["completion_tokens"] == 6
    assert "no video file" in lines[1]["error"]


def generate_arguments(trained, folder, root):
    import argparse

    parser = argparse.ArgumentParser()
    generate.add_arguments(parser)
    sampling = '{"max_tokens": 6, "ignore_eos": true}'
    files = ["--input", str(folder / "ask.jsonl"), "--output", str(folder / "answers.jsonl")]
    return parser.parse_args(
        ["--checkpoint", str(trained), *files, "--image_root", root, "--sampling", sampling]
    )


def test_its_run_is_evaluated_on_videos(trained, tmp_path):
    item = {"video": "a", "question": "What moved?", "candidates": ["x", "y"], "answer": "y"}
    for task in MVBENCH:
        write(tmp_path, f"json/{task}.json", [item])
    for number in range(5):
        clip = tmp_path / "video/star/Charades_segment/a"
        clip.mkdir(parents=True, exist_ok=True)
        frame(number).save(clip / f"{number}.png")
    benchmark = load_benchmark("mvbench", tmp_path, {}).first(2)
    scores = evaluate(Llava.from_pretrained(trained), benchmark, tmp_path / "out", 2, 2)
    assert scores[-1].count == 2
    assert "<img " in (tmp_path / "out/failures.html").read_text()
