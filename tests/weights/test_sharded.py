"""From a folder straight into sharded memory: each host reads the slices of its devices alone."""

import dataclasses
import shutil
import tracemalloc

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from llava_jax.models.llava import abstract_params
from llava_jax.parallel.mesh import make_mesh
from llava_jax.parallel.sharding import param_shardings, put
from llava_jax.weights import checksums
from llava_jax.weights import tensors as tensors_module
from llava_jax.weights.convert import convert
from llava_jax.weights.formats.safetensors_files import TensorToWrite, read_header, write_file
from llava_jax.weights.load import load_components, open_components
from llava_jax.weights.name_tables import Parameter
from llava_jax.weights.read.llava_folder import open_llava
from llava_jax.weights.tensors import LazyParameter, StoredTensor, stored_bytes
from llava_jax.weights.write.save import save_decoder, save_vision
from tests.tiny_model import CONFIG, byte_tokenizer, random_params


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder, params = tmp_path_factory.mktemp("parts"), random_params(CONFIG)
    save_vision(folder / "vision", CONFIG.vision, random_params(every_block())["vision"])
    save_decoder(folder / "decoder", CONFIG.decoder, params["decoder"])
    return folder


def every_block():
    return dataclasses.replace(CONFIG, feature_layer=-1)


@pytest.mark.parametrize("component", ["vision", "decoder"])
def test_placed_on_eight_devices(component, parts):
    mesh = make_mesh(data=1, fsdp=4, tensor=2)
    boxed = abstract_params(CONFIG)[component]
    lazy = open_components(parts / component, [component], CONFIG)[component]
    assert all(isinstance(leaf, LazyParameter) for leaf in jax.tree.leaves(lazy))
    shardings = param_shardings(mesh, boxed)
    placed = jax.tree.map(lambda leaf, to: put(leaf, to, jnp.bfloat16), lazy, shardings)
    expected = load_components(parts / component, [component], CONFIG)[component]
    split = 0
    for array, whole, box in zip(
        *map(jax.tree.leaves, (placed, expected, nn.meta.unbox(boxed))), strict=True
    ):
        assert array.shape == whole.shape == box.shape and array.dtype == jnp.bfloat16
        split += not array.sharding.is_fully_replicated
        for shard in array.addressable_shards:
            expected_slice = whole[shard.index].astype(jnp.bfloat16)
            np.testing.assert_array_equal(np.asarray(shard.data), expected_slice)
    assert split > 5


@pytest.mark.parametrize("transform", ["same", "transpose"])
def test_a_slice_costs_memory_for_itself_alone(transform, tmp_path):
    """An eighth of a tensor in a file is read without the other seven."""
    rows, columns = 1024, 2048
    values = np.arange(rows * columns, dtype=np.float32).reshape(rows, columns)
    write_file(
        tmp_path / "x.safetensors", [TensorToWrite("x", values.shape, values.dtype, lambda: values)]
    )
    ours = values.T if transform == "transpose" else values
    parameter = Parameter("x", "R C", ("x",), transform)
    lazy = LazyParameter(parameter, ours.shape, tuple(read_header(tmp_path / "x.safetensors")))
    eighth = slice(ours.shape[0] // 2, ours.shape[0] // 2 + ours.shape[0] // 8)
    tracemalloc.start()
    read = lazy[eighth, :]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(read, ours[eighth])
    assert peak < values.nbytes / 4


def test_blocks_outside_a_slice_are_not_opened(parts, monkeypatch):
    lazy = open_components(parts / "decoder", ["decoder"], CONFIG)["decoder"]
    kernel = lazy["layers"]["mlp"]["up_proj"]["kernel"]
    opened, whole = [], type(kernel.tensors[0]).map
    monkeypatch.setattr(
        type(kernel.tensors[0]), "map", lambda tensor: opened.append(tensor.name) or whole(tensor)
    )
    assert kernel[1:2, :, 3:5].shape == (1, CONFIG.decoder.hidden_size, 2)
    assert opened == ["model.layers.1.mlp.up_proj.weight"]


def test_a_device_costs_the_bytes_that_it_holds(parts, monkeypatch, tmp_path):
    """Of a converted folder: what is looked at for the devices of a host is what they hold."""
    shutil.copytree(parts, tmp_path / "parts")
    byte_tokenizer().save_pretrained(tmp_path / "parts/decoder")
    fresh = open_llava(tmp_path / "parts/decoder", vision_tower=tmp_path / "parts/vision")
    convert(fresh, tmp_path / "llava")
    checkpoint = open_llava(tmp_path / "llava")
    looked_at, copied = [], tensors_module._copied
    count = lambda values: looked_at.append(values.nbytes) or copied(values)
    monkeypatch.setattr(tensors_module, "_copied", count)
    monkeypatch.setattr(StoredTensor, "read", None)  # never the whole
    mesh = make_mesh(data=1, fsdp=4, tensor=2)
    shardings = flatten_dict(param_shardings(mesh, abstract_params(checkpoint.config)), sep="/")
    held, whole = dict.fromkeys(jax.devices(), 0), 0
    for path, lazy in checkpoint.params.items():
        whole += stored_bytes(lazy.tensors)
        for device, index in shardings[path].devices_indices_map(lazy.shape).items():
            looked_at.clear()
            assert lazy[index].nbytes == sum(looked_at)
            held[device] += sum(looked_at)
    assert whole / 8 < max(held.values()) < whole / 5  # norms and biases are on every device


def test_each_process_verifies_its_part_of_the_files(parts, monkeypatch):
    names = sorted(checksums.read_checksums(parts / "decoder"))
    read, digest = [], checksums.sha256
    monkeypatch.setattr(checksums, "sha256", lambda path: read.append(path.name) or digest(path))
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for index in range(2):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        read.clear()
        assert checksums.verify_checksums(parts / "decoder") == set(names)
        assert read == names[index::2]
