"""A stage that trains LoRA on a quantized base: what it learns and keeps, resuming, using it."""

import json
import shutil

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from llava_jax import Llava, cli
from llava_jax.dry_run.report import bytes_on_a_device
from llava_jax.errors import LlavaError
from llava_jax.models.quantization import is_kernel
from llava_jax.training.stage import Stage
from llava_jax.weights.load import load_run, open_run
from llava_jax.weights.run_directory import checkpoint_of, read_trained, saved_params
from llava_jax.weights.write.save import save_decoder
from tests.tiny_model import CONFIG
from tests.tiny_run import instruct, recipe

STAGE = {
    "trainable": {"projector": 1e-3, "lora": 5e-3},
    "lora.rank": 4,
    "lora.alpha": 8.0,
    "lora.dropout": 0.1,
    "model.quantize": "int8",
    "steps": 2,
    "save_every": 1,
    "data.validation": "",
}


@pytest.fixture(scope="module")
def tuned(world, run, aligned, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("tuned") / "lora"
    run(instruct(world, workdir, aligned, STAGE))
    return workdir


def trained(workdir) -> dict:
    step = checkpoint_of(workdir)
    return read_trained(step, open_run(step)[0])


def test_a_checkpoint_holds_what_trains_alone(tuned):
    assert {path[0] for path in flatten_dict(saved_params(checkpoint_of(tuned)))} == {
        "lora",
        "projector",
    }
    assert json.loads((tuned / "model.json").read_text())["quantize"] == "int8"


def test_the_model_is_the_rounded_base_and_the_update(tuned, aligned):
    run, after = load_run(checkpoint_of(tuned))
    before, pairs = load_run(checkpoint_of(aligned))[1], trained(tuned)["lora"]
    for path, kernel in flatten_dict(before).items():
        found = flatten_dict(after)[path]
        if not is_kernel(path, head=False):
            assert path[0] == "projector" or (np.asarray(found) == kernel).all(), path
            continue
        pair = {half: flatten_dict(pairs)[*path[:-1], f"lora_{half}"] for half in "ab"}
        rounded = found - 2.0 * pair["a"] @ pair["b"]
        largest = abs(kernel).max(axis=1)  # of a column
        assert (abs(rounded - kernel).max(axis=1) <= largest * 0.005).all()
        assert abs(rounded - kernel).max() > 1e-4


def test_it_learns_what_it_would_on_the_rounded_weights(tuned, world, run, aligned, tmp_path):
    """The same run on a base that has the rounded weights as floats."""
    shutil.copytree(world / "parts/decoder", tmp_path / "decoder")
    (tmp_path / "decoder/model.safetensors").unlink()
    pairs = flatten_dict(trained(tuned)["lora"])
    rounded = load_run(checkpoint_of(tuned))[1]["decoder"]
    for path in {path[:-1] for path in pairs}:
        layer = rounded
        for name in path[1:]:
            layer = layer[name]
        layer["kernel"] = layer["kernel"] - 2.0 * pairs[*path, "lora_a"] @ pairs[*path, "lora_b"]
    save_decoder(tmp_path / "floats", CONFIG.decoder, rounded)
    for file in (tmp_path / "decoder").iterdir():
        if not (tmp_path / "floats" / file.name).exists():
            shutil.copy(file, tmp_path / "floats")
    places = {"model.quantize": None, "init.decoder": str(tmp_path / "floats")}
    run(instruct(world, tmp_path / "run", aligned, STAGE | places))
    alike = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5)
    jax.tree.map(alike, trained(tmp_path / "run"), trained(tuned))
    logs = [(w / "metrics.jsonl").read_text().splitlines() for w in (tuned, tmp_path / "run")]
    for lines in zip(*logs, strict=True):
        found, wanted = map(json.loads, lines)
        for name in ("loss", "grad_norm"):
            assert found[name] == pytest.approx(wanted[name], rel=1e-4)


@pytest.mark.slow
def test_it_resumes(world, run, aligned, tuned, tmp_path):
    shutil.copytree(tuned, tmp_path / "lora")
    shutil.rmtree(tmp_path / "lora/checkpoints/2")
    run(instruct(world, tmp_path / "lora", aligned, STAGE))
    jax.tree.map(np.testing.assert_array_equal, trained(tmp_path / "lora"), trained(tuned))


@pytest.mark.slow
def test_four_devices_learn_what_one_does(world, run, aligned, tmp_path):
    changes = STAGE | {"batch_size": 4}
    for name, mesh, devices in (("one", {}, 1), ("more", {"mesh.fsdp": 2, "mesh.tensor": 2}, 4)):
        run(instruct(world, tmp_path / name, aligned, changes | mesh), devices)
    alike = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
    jax.tree.map(alike, trained(tmp_path / "more"), trained(tmp_path / "one"))


def test_it_can_be_asked_and_exported(tuned, tmp_path, capfd):
    assert isinstance(Llava.from_pretrained(tuned).chat("Hi?", max_new_tokens=2), str)
    export = ["export", "--checkpoint", str(tuned), "--out", str(tmp_path / "peft")]
    assert cli.main([*export, "--format", "peft"]) == 0
    assert "was trained on a base in int" in capfd.readouterr().err


def test_the_memory_of_the_base_of_7b(world, tmp_path):
    changes = {"model.preset": "llava-1.5-7b", "model.image_size": None, "model.image_mode": None}
    changes |= {"model.feature_layer": None, "model.dtype": "bfloat16", "data.max_length": 2048}
    values = instruct(world, tmp_path / "run", tmp_path, STAGE | changes)
    sizes = {
        name: bytes_on_a_device(
            Stage.of(recipe({}, values | {"model.quantize": name}), jax.devices()[:1]).frozen[
                "decoder"
            ]
        )
        for name in (None, "int8")
    }
    kernels = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    scales = 4 * 32 * (5 * 4096 + 2 * 11008)
    assert sizes[None] - sizes["int8"] == kernels - scales


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model.quantize": "int4"}, "config.model.quantize is 'int4': choose one of None, int8"),
        (
            {"trainable": {"projector": 1e-3, "decoder": 1e-3}, "lora.rank": 0},
            "config.model.quantize is int8, but config.trainable .*decoder.* trains decoder/layers",
        ),
    ],
)
def test_a_wrong_setting_is_reported(changes, message, world, run, aligned, tmp_path):
    with pytest.raises(LlavaError, match=message):
        run(instruct(world, tmp_path / "run", aligned, STAGE | changes))
