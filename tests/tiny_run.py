"""Everything a tiny training run needs, on disk: pretrained parts, tokenizer, pictures, recipes."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from absl import flags
from ml_collections import ConfigDict
from PIL import Image

from configs import base
from llava_jax.weights.write.save import save_decoder, save_vision
from tests.tiny_model import CONFIG, byte_tokenizer, random_image, random_params

ROOT = Path(__file__).parent.parent
ANSWERS = ("red", "green", "light blue", "it is black and white", "yes")
ALIGN = {
    "model.template": "plain",
    "trainable": {"projector": 1e-3},
    "data.max_length": 64,
    "epochs": None,
    "steps": 4,
}
INSTRUCT = {
    "model.template": "chatml",
    "trainable": {"projector": 1e-3, "decoder": 1e-3},
    "data.max_length": 320,
    "epochs": None,
    "steps": 4,
}


def train_module():
    """train.py as a module, its flags taken back: eval.py defines some of the same names."""
    taken = [name for name in ("config",) if name in flags.FLAGS]
    if taken:
        flags.FLAGS.remove_flag_values(taken)
    import train

    if "config" in flags.FLAGS:
        flags.FLAGS.remove_flag_values(["config"])
    return train


def write_parts(folder: Path, seed: int = 0) -> None:
    """folder/vision and folder/decoder, in Hugging Face's layout, the latter with a tokenizer."""
    every_block = dataclasses.replace(CONFIG, feature_layer=-1)
    params = random_params(every_block, seed)
    # Logits near zero at the start, as those of a trained model are near its data's.
    params["decoder"]["lm_head"]["kernel"] *= 0.1
    save_vision(folder / "vision", CONFIG.vision, params["vision"])
    save_decoder(folder / "decoder", CONFIG.decoder, params["decoder"])
    byte_tokenizer().save_pretrained(folder / "decoder")


def caption(i: int) -> dict:
    return {
        "id": f"caption-{i}",
        "image": f"{i}.png",
        "conversations": [
            {"from": "human", "value": "<image>"},
            {"from": "gpt", "value": ANSWERS[i % 5]},
        ],
    }


def conversation(i: int) -> dict:
    """Questions about one picture, about two, or about none; one turn or two."""
    pictures = [[f"{i}.png"], [], [f"{i}.png", "0.png"]][i % 3]
    turns = [("<image>" * len(pictures) + "What?", ANSWERS[i % 5]), ("Sure?", "yes")][: 1 + i % 2]
    values = [v for question, answer in turns for v in (("human", question), ("gpt", answer))]
    record = {"id": f"talk-{i}", "conversations": [{"from": f, "value": v} for f, v in values]}
    return record | ({"image": pictures} if pictures else {})


def pair(i: int) -> dict:
    """A question about one picture, or about none, with two answers of other lengths."""
    answers = {"chosen": ANSWERS[i % 5], "rejected": ANSWERS[(i + 1 + i // 5) % 5]}
    if i % 3 == 1:
        return {"id": f"pair-{i}", "prompt": "What?", **answers}
    return {"id": f"pair-{i}", "image": f"{i}.png", "prompt": "<image>\nWhat?", **answers}


def write_data(folder: Path, count: int = 24) -> None:
    """folder/images, align.json, instruct.json and held_out.json."""
    (folder / "images").mkdir(parents=True)
    for i in range(count):
        random_image(i, (12, 9 + i % 5)).save(folder / "images" / f"{i}.png")
    sets = {
        "align": [caption(i) for i in range(count)],
        "instruct": [conversation(i) for i in range(count)],
        "held_out": [conversation(i) for i in range(5)],
    }
    for name, records in sets.items():
        (folder / f"{name}.json").write_text(json.dumps(records))


def write_broken_image(path: Path) -> None:
    """A JPEG that ends in the middle of its pixels."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:1500])


def recipe(stage: dict, changes: dict | None = None) -> ConfigDict:
    """configs/base.py with the values of a stage and then `changes`, by dotted key."""
    config = base.get_config()
    small = {
        "model.image_size": 8,
        "model.feature_layer": -2,
        "model.image_mode": "square",
        "model.dtype": "float32",
        "data.images_per_row": 4,
        "mesh.fsdp": -1,
        "batch_size": 2,
        "log_every": 1,
        "save_every": 2,
        "validate_every": 2,
        "samples": 0,  # an engine and its compilations, for the tests that look at the answers
        "sample_tokens": 4,
    }
    for key, value in {**small, **stage, **(changes or {})}.items():
        *parents, name = key.split(".")
        place = config
        for parent in parents:
            place = place[parent]
        if name == "trainable":
            place[name] = ConfigDict(value)
        else:
            place[name] = value
    return config.lock()


def align(world: Path, workdir: Path, changes: dict | None = None) -> dict:
    """The values of a stage 1 run, by dotted key."""
    places = {
        "workdir": str(workdir),
        "init.vision": str(world / "parts/vision"),
        "init.decoder": str(world / "parts/decoder"),
        "data.train": str(world / "data/align.json"),
        "data.image_root": str(world / "data/images"),
    }
    return {**ALIGN, **places, **(changes or {})}


def instruct(world: Path, workdir: Path, start: Path, changes: dict | None = None) -> dict:
    """The values of a stage 2 run that starts from the run directory `start`."""
    places = {
        "workdir": str(workdir),
        "init.checkpoint": str(start),
        "data.train": str(world / "data/instruct.json"),
        "data.validation": str(world / "data/held_out.json"),
        "data.image_root": str(world / "data/images"),
    }
    return {**INSTRUCT, **places, **(changes or {})}


def preferences(
    world: Path, workdir: Path, start: Path, pairs: Path, changes: dict | None = None
) -> dict:
    """The values of a run on the pairs of a file, whose pictures are next to it."""
    places = {"data.train": str(pairs), "data.validation": "", "data.image_root": ""}
    return instruct(world, workdir, start, {"loss": "dpo", **places, **(changes or {})})


def start_script(
    world: Path, values: dict, *arguments: str, file_size: int | None = None, **environment: str
) -> subprocess.Popen:
    """Starts `python train.py` with a config file of these values, on one device.

    Args:
      file_size: KiB that a file it writes may have at most.
    """
    config = world / f"config_{abs(hash(json.dumps(values)))}.py"
    config.write_text(
        "from tests.tiny_run import recipe\n\n\n"
        f"def get_config():\n    return recipe({{}}, {values!r})\n"
    )
    surroundings = os.environ | {
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1",
        "PYTHONPATH": str(ROOT / "tests/without_torch"),
    }
    limit = ["bash", "-c", f'ulimit -f {file_size}; exec "$0" "$@"'] if file_size else []
    return subprocess.Popen(
        [*limit, sys.executable, "train.py", f"--config={config}", *arguments],
        cwd=ROOT,
        env=surroundings | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_script(world: Path, values: dict, *arguments: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `python train.py`."""
    process = start_script(world, values, *arguments)
    out, err = process.communicate(timeout=400)
    return process.returncode, out, err
