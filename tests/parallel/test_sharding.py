"""Sharded over eight simulated devices = on one: loss, gradients and updated parameters."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from llava_jax.dry_run.collectives import read_collectives
from llava_jax.errors import LlavaError
from llava_jax.models.llava import LlavaConfig, LlavaModel, abstract_params
from llava_jax.models.lora import LoraConfig, init_lora
from llava_jax.models.presets import PRESETS
from llava_jax.parallel.mesh import make_mesh
from llava_jax.parallel.sharding import (
    RULES,
    batch_sharding,
    equal_part,
    param_shardings,
    process_part,
    put,
    put_batch,
    replicated,
)
from llava_jax.training.optimizer import adamw, optimizer_shardings, split_params, warmup_cosine
from llava_jax.training.state import abstract_model, abstract_state, fresh_state, joined, place
from llava_jax.training.step import AnswerLoss, make_train_step
from tests.tiny_model import CONFIG, VISION, features_of, random_params

GROUPS = {"projector": 1e-2, "decoder": 1e-2}
OPTIONS = {"b1": 0.9, "b2": 0.999, "eps": 1e-3, "weight_decay": 0.1, "clip_norm": 1.0}


def boxes(config: LlavaConfig) -> list[nn.LogicallyPartitioned]:
    is_box = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)
    leaves = jax.tree.leaves(abstract_params(config), is_leaf=is_box)
    assert all(map(is_box, leaves)), "a parameter without logical axis names"
    return leaves


EVERYTHING = dataclasses.replace(  # every optional parameter there is
    CONFIG,
    vision=dataclasses.replace(VISION, pre_norm=True),
    decoder=dataclasses.replace(
        CONFIG.decoder, qkv_bias=True, o_bias=True, mlp_bias=True, qk_norm=True
    ),
)


@pytest.mark.parametrize("config", [EVERYTHING, *PRESETS.values()], ids=["all", *PRESETS])
def test_every_parameter_has_axes_that_the_table_knows(config):
    rules = dict(RULES)
    for box in boxes(config):
        assert len(box.names) == len(box.value.shape)
        assert set(box.names) <= rules.keys()


def test_the_table_names_each_axis_once():
    assert len(dict(RULES)) == len(RULES)


@pytest.mark.parametrize("name", ["llava-v1-7b", "llava-1.5-13b"])
def test_large_matrices_are_spread_over_all_of_fsdp_and_tensor(name):
    mesh = make_mesh(data=1, fsdp=4, tensor=2)
    config = PRESETS[name]
    shapes = jax.tree.leaves(nn.meta.unbox(abstract_params(config)))
    shardings = jax.tree.leaves(param_shardings(mesh, abstract_params(config)))
    share = 0
    for leaf, sharding in zip(shapes, shardings, strict=True):
        here = np.prod(sharding.shard_shape(leaf.shape))
        share += here
        if leaf.size > 1e8:
            assert here == leaf.size / 8
    assert share < 1.02 * sum(leaf.size for leaf in shapes) / 8


def test_an_axis_that_does_not_divide_is_replicated():
    mesh = make_mesh(data=1, fsdp=1, tensor=8)
    odd = dataclasses.replace(CONFIG, decoder=dataclasses.replace(CONFIG.decoder, vocab_size=301))
    params = param_shardings(mesh, abstract_params(odd))["decoder"]
    assert params["embed_tokens"]["embedding"].spec == PartitionSpec(None, "fsdp")
    assert params["layers"]["self_attn"]["q_proj"]["kernel"].spec[2] == "tensor"


def batch(config: LlavaConfig, rows: int = 8) -> dict:
    """Packed rows of two conversations, of which some have an image, with uneven supervision."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, config.decoder.vocab_size, (rows, 16)).astype(np.int32)
    ids[::2, 1:5] = ids[1::3, 9:13] = config.image_token_id
    labels = np.where((rng.random(ids.shape) < 0.4) & (ids >= 0), ids, -100).astype(np.int32)
    return {
        "input_ids": ids,
        "labels": labels,
        "position_ids": np.tile(np.r_[:7, :9].astype(np.int32), (rows, 1)),
        "segment_ids": np.tile(np.repeat([1, 2], (7, 9)).astype(np.int32), (rows, 1)),
        "tiles": rng.integers(0, 256, (rows, 2, 8, 8, 3)).astype(np.uint8),
        **features_of(ids, 2, config),
    }


def train(config: LlavaConfig, mesh, steps: int = 2, accumulation: int = 1, lora=None):
    """Host copies of (losses, trained parameters) after some steps on a mesh."""
    groups = GROUPS if lora is None else {"lora": 1e-2}
    optimizer = adamw(groups, warmup_cosine(5, 0.0), **OPTIONS)
    losses, boxed = [], abstract_model(config, lora)
    params = random_params(config)
    if lora:
        params["lora"] = init_lora(boxed["lora"], jax.random.key(0))
    wanted, frozen = abstract_state(mesh, boxed, groups, optimizer, jnp.float32)
    state = fresh_state(wanted, params, optimizer)
    frozen = place(params, frozen)
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        step = jitted_step(config, optimizer, accumulation, state, lora)
        arrays = put_batch(mesh, batch(config))
        for _ in range(steps):
            state, metrics = step(state, frozen, arrays)
            losses.append(float(metrics["loss"]))
    return losses, jax.device_get(state.params)


def jitted_step(config: LlavaConfig, optimizer, accumulation: int, state, lora=None):
    placed = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = make_train_step(AnswerLoss(LlavaModel(config), 8), optimizer, accumulation, joined(lora))
    return jax.jit(step, out_shardings=(placed, None))


ONE_KV_HEAD = dataclasses.replace(
    CONFIG, decoder=dataclasses.replace(CONFIG.decoder, num_kv_heads=1, qk_norm=True)
)


@pytest.fixture(scope="module")
def one_device():
    mesh = make_mesh(devices=jax.devices()[:1])
    return {config: train(config, mesh) for config in (CONFIG, ONE_KV_HEAD)}


@pytest.mark.parametrize(
    "config, sizes, accumulation",
    [
        pytest.param(CONFIG, {"data": 8, "fsdp": 1}, 1, marks=pytest.mark.slow),
        pytest.param(CONFIG, {"data": 2, "fsdp": 4}, 1, marks=pytest.mark.slow),
        (CONFIG, {"data": 2, "fsdp": 2, "tensor": 2}, 2),
        (ONE_KV_HEAD, {"data": 1, "fsdp": 2, "tensor": 4}, 1),  # fewer kv heads than `tensor`
    ],
    ids=["data", "fsdp", "all three, accumulated", "tensor over one kv head"],
)
def test_sharded_is_one_device(config, sizes, accumulation, one_device):
    losses, params = train(config, make_mesh(**sizes), accumulation=accumulation)
    wanted_losses, wanted = one_device[config]
    np.testing.assert_allclose(losses, wanted_losses, rtol=1e-5)
    assert wanted_losses[1] < wanted_losses[0]
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def crossing_bytes(accumulation: int) -> float:
    """Bytes of sums that a step on a mesh of eight parts of the data axis brings each device."""
    mesh, optimizer = make_mesh(data=8, fsdp=1), adamw(GROUPS, warmup_cosine(5, 0.0), **OPTIONS)
    state, frozen = abstract_state(mesh, abstract_model(CONFIG, None), GROUPS, optimizer, "float32")
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        step = jitted_step(CONFIG, optimizer, accumulation, state)
        text = step.lower(state, frozen, put_batch(mesh, batch(CONFIG, 32))).compile().as_text()
    return sum(c.received for c in read_collectives(text, 8))


def test_gradients_cross_the_data_axis_once_a_step():
    assert crossing_bytes(4) == pytest.approx(crossing_bytes(1), rel=0.01)


LORA = LoraConfig(4, 8.0, ("decoder/layers/*", "vision/layers/*"), dropout=0.2)


@pytest.fixture(scope="module")
def dropped_on_one_device():
    return train(CONFIG, make_mesh(devices=jax.devices()[:1]), lora=LORA)


@pytest.mark.parametrize(
    "sizes, accumulation",
    [
        pytest.param({"data": 1, "fsdp": 1}, 4, marks=pytest.mark.slow),
        ({"data": 2, "fsdp": 2, "tensor": 2}, 2),
    ],
    ids=["accumulated", "all three, accumulated"],
)
def test_dropout_of_lora_is_one_device_s(sizes, accumulation, dropped_on_one_device):
    """What a row drops depends on neither the mesh nor the number of microbatches."""
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    losses, params = train(CONFIG, make_mesh(**sizes, devices=devices), 2, accumulation, LORA)
    wanted_losses, wanted = dropped_on_one_device
    np.testing.assert_allclose(losses, wanted_losses, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_moments_lie_where_their_parameters_do():
    mesh = make_mesh(data=1, fsdp=4, tensor=2)
    trainable, _ = split_params(random_params(CONFIG), GROUPS)
    shardings, _ = split_params(param_shardings(mesh, abstract_params(CONFIG)), GROUPS)
    optimizer = adamw(GROUPS, warmup_cosine(5, 0.0), **OPTIONS)
    found = optimizer_shardings(optimizer, trainable, shardings, replicated(mesh))
    moments = [leaf for leaf in jax.tree.leaves(found) if leaf != replicated(mesh)]
    sharded = [leaf for leaf in jax.tree.leaves(shardings) if leaf != replicated(mesh)]
    assert len(moments) == 2 * len(sharded) > 10


def test_a_device_holds_its_slice_alone():
    mesh = make_mesh(data=1, fsdp=4, tensor=2)
    shardings = param_shardings(mesh, abstract_params(CONFIG))
    params = jax.tree.map(
        lambda leaf, sharding: put(leaf, sharding, jnp.bfloat16), random_params(CONFIG), shardings
    )
    kernel = params["decoder"]["layers"]["mlp"]["gate_proj"]["kernel"]
    assert kernel.dtype == jnp.bfloat16
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(2, 32 // 4, 48 // 2)}
    original = random_params(CONFIG)["decoder"]["layers"]["mlp"]["gate_proj"]["kernel"]
    np.testing.assert_array_equal(kernel, original.astype(jnp.bfloat16))


def test_rows_of_a_batch_are_split_over_data_and_fsdp():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    arrays = put_batch(mesh, batch(CONFIG))
    assert batch_sharding(mesh).spec == PartitionSpec(("data", "fsdp"))
    shapes = {shard.data.shape for shard in arrays["tiles"].addressable_shards}
    assert shapes == {(2, 2, 8, 8, 3)}
    np.testing.assert_array_equal(arrays["labels"], batch(CONFIG)["labels"])


def test_processes_read_the_rows_that_their_devices_hold():
    assert process_part(make_mesh(data=2, fsdp=2, tensor=2)) == (0, 1)
    apart = {0: {0, 1}, 1: {2, 3}, 2: {4, 5}}
    assert [equal_part(apart, p) for p in apart] == [(0, 3), (1, 3), (2, 3)]
    shared = {0: {0}, 1: {4}, 2: {0}, 3: {4}}  # the tensor axis crosses processes
    assert [equal_part(shared, p) for p in shared] == [(0, 2), (1, 2), (0, 2), (1, 2)]
    mixed = {0: {0, 3}, 1: {1, 2}}
    assert [equal_part(mixed, p) for p in mixed] == [(0, 2), (1, 2)]


@pytest.mark.parametrize("rows", [{0: {0, 1}, 1: {1, 2}}, {0: {0, 1}, 1: {2}}])
def test_rows_unevenly_over_processes_are_refused(rows):
    with pytest.raises(LlavaError, match="unevenly over 2 processes: make config.mesh.tensor"):
        equal_part(rows, 0)
