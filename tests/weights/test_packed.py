"""Folders quantized by AWQ and GPTQ, against the formats' own definitions and transformers."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from llava_jax import cli
from llava_jax.errors import LlavaError
from llava_jax.inference.model import Llava
from llava_jax.parallel.mesh import make_mesh
from llava_jax.weights.formats.packed import PackedTensor, read_packing
from llava_jax.weights.read.llava_folder import load_llava, open_llava
from tests.weights.family_models import family_model, save_family

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

GROUP = 16  # of 32 and 48 inputs
AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False}
KINDS = {
    "awq": AWQ,
    "gptq": GPTQ | {"checkpoint_format": "gptq"},
    "gptq v2": GPTQ | {"checkpoint_format": "gptq_v2"},
    "gptq in any order": GPTQ | {"desc_act": True},
    "gptq of 8 bits": GPTQ | {"bits": 8},
    "symmetric gptq": GPTQ | {"sym": True},
    "gptq of columns": GPTQ | {"group_size": -1},
}


def pack(integers: np.ndarray, bits: int, axis: int, order=None) -> np.ndarray:
    """Unsigned integers [a, b] -> int32, the first of `order` in the lowest bits."""
    several = 32 // bits
    order = range(several) if order is None else order
    integers = integers.swapaxes(axis, -1).astype(np.uint32)
    packed = np.zeros((integers.shape[0], integers.shape[1] // several), np.uint32)
    for column in range(packed.shape[1]):
        for place, which in enumerate(order):
            packed[:, column] |= integers[:, column * several + which] << np.uint32(bits * place)
    return np.ascontiguousarray(packed.swapaxes(axis, -1)).view(np.int32)


def quantized(values: dict, inputs: int, outputs: int, rng) -> tuple[dict, np.ndarray]:
    """The tensors of a random kernel, and its weights [out, in] by the definition, in float32."""
    bits, group = values["bits"], values["group_size"]
    group = inputs if group == -1 else group
    integers = rng.integers(0, 2**bits, (inputs, outputs))
    zeros = rng.integers(1, 2**bits, (inputs // group, outputs))
    zeros = zeros * 0 + 2 ** (bits - 1) if values.get("sym") else zeros
    scales = rng.uniform(0.01, 0.04, zeros.shape).astype(np.float16) * np.float16(
        8 / 2 ** (bits - 1)
    )
    of_input = np.arange(inputs) // group
    if values.get("desc_act"):
        of_input = rng.permutation(of_input)
    weights = (integers - zeros[of_input]) * scales[of_input].astype(np.float32)
    if values["quant_method"] == "awq":
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        packed = {"qweight": pack(integers, 4, 1, order), "qzeros": pack(zeros, 4, 1, order)}
    else:
        stored = zeros - (values.get("checkpoint_format") != "gptq_v2")
        packed = {"qweight": pack(integers, bits, 0), "qzeros": pack(stored, bits, 1)}
        packed["g_idx"] = of_input.astype(np.int32)
    return packed | {"scales": scales}, weights.T.astype(np.float32)


def quantize_folder(folder: Path, values: dict) -> dict[str, np.ndarray]:
    """Packs the kernels of a folder's layers; the weights that they stand for, by name."""
    rng, weights = np.random.default_rng(0), {}
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if "layers" in name and "language" in name]:
        if name.endswith("_proj.weight"):
            outputs, inputs = tensors.pop(name).shape
            packed, weights[name] = quantized(values, inputs, outputs, rng)
            layer = name.removesuffix(".weight")
            tensors |= {f"{layer}.{end}": array for end, array in packed.items()}
            if values["quant_method"] == "gptq":  # as AutoGPTQ does for every kernel
                tensors[f"{layer}.bias"] = np.zeros(outputs, np.float16)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    edit(folder, quantization_config=values)
    return weights


def edit(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """(a LLaVA-NeXT, its folder)."""
    model = family_model("llava_next")
    return model, save_family(tmp_path_factory.mktemp("plain") / "model", model)


def packed_pair(kind: str, plain, folder: Path) -> tuple[Path, dict, np.ndarray]:
    """(a quantized folder, the weights that it stands for, transformers' logits with them)."""
    model, source = plain
    shutil.copytree(source, folder)
    weights = quantize_folder(folder, KINDS[kind])
    in_memory = lambda name: name.replace("language_model.model.", "model.language_model.")
    own = {in_memory(name): torch.from_numpy(array) for name, array in weights.items()}
    assert len(own) == 7 * 3 and not model.load_state_dict(own, strict=False).unexpected_keys
    with torch.no_grad():
        logits = model(input_ids=torch.arange(20)[None]).logits.numpy()
    return folder, weights, logits


@pytest.fixture(scope="module", params=KINDS)
def pair(request, plain, tmp_path_factory):
    return packed_pair(request.param, plain, tmp_path_factory.mktemp("packed") / "model")


@pytest.fixture(
    scope="module", params=[pytest.param("awq", marks=pytest.mark.slow), "gptq in any order"]
)
def some_pair(request, plain, tmp_path_factory):
    return packed_pair(request.param, plain, tmp_path_factory.mktemp("packed") / "model")


def test_the_values_are_those_of_the_definition(pair):
    folder, weights, _ = pair
    _, params = load_llava(folder)
    layers = params["decoder"]["layers"]
    for name, wanted in weights.items():
        _, _, _, layer, block, proj, _ = name.split(".")
        np.testing.assert_array_equal(layers[block][proj]["kernel"][int(layer)], wanted.T)


def test_a_model_that_answers_keeps_the_integers_and_has_the_logits_of_transformers(pair, capfd):
    folder, _, wanted = pair
    model = Llava.from_pretrained(folder, template="mistral_instruct")
    assert "is quantized (" in capfd.readouterr().err
    flat = flatten_dict(model.engine.params["decoder"])
    kernels = {
        path: leaf for path, leaf in flat.items() if path[-1] == "kernel" and path[0] == "layers"
    }
    assert len(kernels) == 7 * 3
    zeros = [path for path in flat if path[-1] == "kernel_zero"]
    values = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert len(zeros) == (0 if values.get("sym") else 7 * 3)  # a product more, where there are any
    assert {leaf.dtype for leaf in kernels.values()} == {
        jnp.dtype(jnp.int8 if values["bits"] == 8 else jnp.int4)
    }
    ids = np.arange(20)[None]
    np.testing.assert_allclose(model.logits(ids), wanted, atol=1e-4, rtol=1e-4)


def test_it_answers_on_one_device_and_on_two(some_pair):
    folder, _, wanted = some_pair
    model = Llava.from_pretrained(folder, template="mistral_instruct")
    assert isinstance(model.chat("What?", max_new_tokens=2), str)
    mesh = make_mesh(1, 1, 2, jax.devices()[:2])
    spread = Llava.from_pretrained(folder, template="mistral_instruct", mesh=mesh)
    np.testing.assert_allclose(spread.logits(np.arange(20)[None]), wanted, atol=1e-4, rtol=1e-4)


def test_convert_writes_floats(some_pair, tmp_path, capsys):
    folder, weights, _ = some_pair
    out = tmp_path / "out"
    assert cli.main(["convert", "--checkpoint", str(folder), "--out", str(out)]) == 0
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    written = load_file(out / "model.safetensors")
    for name, wanted in weights.items():
        np.testing.assert_array_equal(written[name], wanted)


REFUSED = [
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quant_method='bitsandbytes'"),
    ({"quant_method": "compressed-tensors"}, "only awq and gptq can be read: give the folder of"),
    ({"load_in_4bit": True}, "quant_method='none'"),
    (["awq"], "quant_method='none'"),
    (AWQ | {"version": "gemv"}, "the form 'gemv' of awq, of which only gemm can be read"),
    (AWQ | {"bits": 3}, "bits=3, of which only 4"),
    (GPTQ | {"bits": 2}, "bits=2, of which only 4 and 8"),
    (GPTQ | {"checkpoint_format": "marlin"}, "the form 'marlin'"),
    (GPTQ | {"is_marlin_format": True}, "the form 'marlin'"),
    (GPTQ | {"group_size": 0}, "group_size=0"),
]


@pytest.mark.parametrize("values, message", REFUSED)
def test_methods_that_cannot_be_read(values, message, plain, tmp_path):
    with pytest.raises(LlavaError, match=f"config.json has a quantization_config.*{message}"):
        read_packing(values, "config.json")


def test_the_key_is_found_wherever_it_stands(plain, tmp_path):
    config = json.loads((plain[1] / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "hqq"}})
    )
    with pytest.raises(LlavaError, match="quant_method='hqq'"):
        open_llava(tmp_path)
    config["text_config"]["quantization_config"] = {"quant_method": "hqq"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(LlavaError, match=r"text_config\) has .*quant_method='hqq'"):
        open_llava(tmp_path)


@pytest.fixture
def damaged(plain, tmp_path):
    """Calls a function with the tensors of a GPTQ folder, writes them back, and opens it."""
    shutil.copytree(plain[1], tmp_path / "model")
    folder = tmp_path / "model"
    quantize_folder(folder, GPTQ)

    def damage(change):
        tensors = load_file(folder / "model.safetensors")
        change(tensors, "language_model.model.layers.1.mlp.up_proj")
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return open_llava(folder)

    damage.folder = folder
    return damage


def test_what_does_not_fit_is_named(damaged):
    with pytest.raises(LlavaError, match=r"up_proj.bias"):
        damaged(lambda t, name: t.update({f"{name}.bias": np.ones(48, np.float16)}))
    with pytest.raises(LlavaError, match=r"no .*layers.1.mlp.up_proj.scales"):
        damaged(
            lambda t, name: (
                t.update({f"{name}.bias": np.zeros(48, np.float16)}) or t.pop(f"{name}.scales")
            )
        )
    with pytest.raises(
        LlavaError, match=r"scales' in .* is F16 \[3, 48\] and not F16 \[2, 48\], as g"
    ):
        damaged(lambda t, name: t.update({f"{name}.scales": np.ones((3, 48), np.float16)}))
    scales = np.ones((2, 48), np.float16)
    uneven = np.zeros(32, np.int32)
    opened = damaged(lambda t, name: t.update({f"{name}.scales": scales, f"{name}.g_idx": uneven}))
    with pytest.raises(LlavaError, match=r"up_proj.g_idx' in .* does not name each group 16 times"):
        opened.read()
    edit(damaged.folder, quantization_config=GPTQ | {"group_size": 5})
    with pytest.raises(LlavaError, match="48 inputs, which are no multiple of group_size=5"):
        open_llava(damaged.folder)
    edit(damaged.folder, quantization_config=None)
    with pytest.raises(LlavaError, match="qweight, but its config.json has no quantization_config"):
        open_llava(damaged.folder)


def test_a_kernel_of_which_a_layer_was_left_out_is_one_of_floats(damaged):
    def leave_out(tensors, name):
        for end in ("qweight", "qzeros", "scales", "g_idx", "bias"):
            tensors.pop(f"{name}.{end}")
        tensors[f"{name}.weight"] = np.ones((48, 32), np.float32)

    opened = damaged(leave_out)
    assert any("decoder/layers/mlp/up_proj/kernel of" in note for note in opened.notes)
    held = [
        isinstance(t, PackedTensor)
        for t in opened.params["decoder/layers/mlp/up_proj/kernel"].tensors
    ]
    assert held == [True, False, True]
    model = Llava.from_pretrained(damaged.folder, template="mistral_instruct")
    flat = flatten_dict(model.engine.params["decoder"])
    assert flat["layers", "0", "mlp", "up_proj", "kernel"].dtype == jnp.float32
    assert flat["layers", "0", "mlp", "gate_proj", "kernel"].dtype == jnp.int4
