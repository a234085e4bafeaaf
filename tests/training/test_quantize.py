"""`llava-jax quantize`: a folder in four bits, from a run or a folder and a recipe's records."""

import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file

from llava_jax import cli
from llava_jax.inference.model import Llava
from llava_jax.weights.write.packed import packed_kernel
from tests import tiny_run
from tests.weights.test_packed import pack


@pytest.fixture
def recipe(world, tmp_path):
    """A config file of the recipe of the finished stage 1."""
    values = tiny_run.align(world, tmp_path / "other")
    file = tmp_path / "recipe.py"
    text = "from tests import tiny_run\n\n\ndef get_config():\n"
    file.write_text(f"{text}    return tiny_run.recipe({{}}, {values!r})\n")
    return file


def quantize(*arguments) -> int:
    return cli.main(["quantize", *map(str, arguments)])


def test_a_run_in_four_bits_is_a_folder_that_answers(aligned, recipe, tmp_path, capfd):
    out = tmp_path / "int4"
    assert quantize("--checkpoint", aligned, "--config", recipe, "--rows", 6, "--out", out) == 0
    said = capfd.readouterr().err
    ours, nearest = map(float, re.findall(r"by ([\d.]+)%", said))
    assert "12 kernels: their outputs are off by" in said and 0 < ours < 0.7 * nearest < 2
    values = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (values["quant_method"], values["bits"], values["group_size"]) == ("gptq", 4, 32)
    tensors = load_file(out / "model.safetensors")
    packed = [name for name in tensors if name.endswith(".qweight")]
    assert packed and not any("down_proj" in name for name in packed)  # 48 inputs: no whole groups
    assert not any(name.replace("qweight", "weight") in tensors for name in packed)

    model = Llava.from_pretrained(out, template="v1")
    assert "is quantized (gptq, 4 bits in groups of 32)" in capfd.readouterr().err
    kernels = flatten_dict(model.engine.params["decoder"]["layers"])
    of_four = {path[-2] for path, leaf in kernels.items() if leaf.dtype == jnp.int4}
    assert of_four == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"}
    assert isinstance(model.chat("What is it?", max_tokens=2), str)

    again = tmp_path / "again"
    assert quantize("--checkpoint", out, "--config", recipe, "--out", again) == 1
    assert "is quantized already: give the model before it was" in capfd.readouterr().err
    assert not again.exists()


def test_what_is_wrong_is_said_before_anything_is_read(aligned, recipe, tmp_path, capsys):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").touch()
    given = ["--checkpoint", aligned, "--config", recipe]
    assert quantize(*given, "--out", taken) == 1
    assert "exists already" in capsys.readouterr().err
    assert quantize(*given, "--out", tmp_path / "new", "--rows", 0) == 1
    assert "--rows must be at least 1, not 0" in capsys.readouterr().err


def test_kernels_are_packed_as_the_format_says():
    rng = np.random.default_rng(0)
    values = rng.integers(-8, 8, (64, 16)).astype(np.int8)
    scales = rng.uniform(0.1, 1, (2, 16)).astype(np.float16)
    tensors = {tensor.name: tensor.values() for tensor in packed_kernel("x", values, scales)}
    np.testing.assert_array_equal(tensors["x.qweight"], pack(values + 8, 4, 0))
    np.testing.assert_array_equal(tensors["x.qzeros"], pack(np.full((2, 16), 7), 4, 1))
    np.testing.assert_array_equal(tensors["x.g_idx"], np.repeat([0, 1], 32))
    assert {name: array.dtype for name, array in tensors.items()} == {
        "x.qweight": np.int32, "x.qzeros": np.int32, "x.scales": np.float16, "x.g_idx": np.int32
    }  # fmt: skip
