"""A stage on records with boxes: what it learns from, what it shows, what it leaves."""

import json
import re
import shutil

import pytest
from PIL import Image

from llava_jax import Llava
from llava_jax.weights.load import load_run
from llava_jax.weights.run_directory import checkpoint_of
from tests.test_train import assert_same_trees
from tests.tiny_run import instruct

BOX = re.compile(r"\[\d+, \d+, \d+, \d+\]")


@pytest.fixture(scope="module")
def stage(tmp_path_factory) -> dict:
    """Changes of a recipe: data with boxes, written as thousandths, on pictures that change."""
    folder = tmp_path_factory.mktemp("boxes")
    items = []
    for i in range(24):
        box = [2 + i, 3, 12 + i, 13]
        image = Image.new("RGB", (40, 40))
        image.paste((200, 100, 0), tuple(box))
        image.save(folder / f"{i}.png")
        turns = [
            {"from": "human", "value": "<image>\nwhat is at <box>?"},
            {"from": "gpt", "value": "a box, <box>"},
        ]
        item = {"id": str(i), "image": f"{i}.png", "conversations": turns}
        items.append(item | {"boxes": [box, box], "box_format": "xyxy_pixel"})
    (folder / "data.json").write_text(json.dumps(items))
    data = str(folder / "data.json")
    return {
        "data.train": data,
        "data.validation": data,
        "data.image_root": str(folder),
        "data.box_convention": "qwen_1000",
        "data.flip": 0.5,
        "data.crop": 0.2,
        "samples": 1,
    }


@pytest.fixture(scope="module")
def trained(world, run, aligned, stage, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("boxes_run") / "instruct"
    run(instruct(world, workdir, aligned, stage))
    return workdir


def test_held_out_questions_have_their_boxes_written(trained):
    samples = [json.loads(line) for line in (trained / "samples.jsonl").open()]
    assert samples
    for sample in samples:
        assert sample["question"].endswith("what is at [50, 75, 300, 325]?")
        assert BOX.search(sample["reference"]) and "<box>" not in str(sample)


def test_the_run_knows_its_convention(trained):
    model = Llava.from_pretrained(trained)
    assert model.boxes.read("[50, 75, 300, 325]", (40, 40)) == [(2, 3, 12, 13)]


def test_it_resumes_bit_for_bit_with_changed_pictures(
    world, run, aligned, stage, trained, tmp_path
):
    shutil.copytree(trained, tmp_path / "parts")
    steps = sorted(int(path.name) for path in (trained / "checkpoints").iterdir())
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / str(steps[-1]))
    run(instruct(world, tmp_path / "parts", aligned, stage))
    assert_same_trees(*(load_run(checkpoint_of(d))[1] for d in (tmp_path / "parts", trained)))
