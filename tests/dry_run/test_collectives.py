"""Collectives and kernels read from a program's text: by hand, and compiled programs by count."""

import collections
import dataclasses
import importlib.util
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from llava_jax.dry_run.collectives import read_collectives
from llava_jax.dry_run.program import instructions, kernel_cycles, read_program
from llava_jax.dry_run.topology import topology
from llava_jax.models.decoder import Decoder
from llava_jax.models.linear import matmul
from llava_jax.models.lora import LoraConfig, abstract_lora, attach_lora
from llava_jax.models.presets import preset
from llava_jax.parallel.mesh import make_mesh
from llava_jax.training.step import COMPILER_OPTIONS

# As the TPU compiler writes: a gather in a loop of three turns, split over two fusions that share
# a channel; a scatter as a reduction of which a slice is kept; a permutation and a scatter beside
# it; two gathers that share a channel and nothing else; a reduction of two arrays; a loop without
# limit; a sum over slices, which the hosts do, and something else that comes from a host.
TEXT = """\
HloModule step
%gather.1 (p: bf16[1,8]) -> bf16[4,8] {
  ROOT %all-gather.1 = bf16[4,8]{1,0} all-gather(%p), channel_id=7, replica_groups=mesh['a'=4,'b'=2] {'a'}, dimensions={0}, metadata={op_name="layers/up_proj"}
}
%gather.2 (p: bf16[1,8]) -> bf16[4,8] {
  ROOT %all-gather.2 = bf16[4,8]{1,0} all-gather(%p), channel_id=7, replica_groups=mesh['a'=4,'b'=2] {'a'}, dimensions={0}
}
%all-reduce-scatter.clone.1 (input: bf16[40,4]) -> bf16[5,4] {
  %all-reduce.3 = bf16[40,4]{1,0:T(8,128)(2,1)} all-reduce(%input), channel_id=4, replica_groups=[1,8]<=[8], to_apply=%add
  ROOT %dynamic-slice.17 = bf16[5,4]{1,0} dynamic-slice(%all-reduce.3, %multiply.4, %constant.106), dynamic_slice_sizes={5,4}
}
%body (p: (s32[], bf16[1,8])) -> (s32[], bf16[1,8]) {
  %start = bf16[4,8]{1,0} fusion(%x), kind=kCustom, calls=%gather.1, backend_config={"window_config":{"estimated_cycles":"70","cost_model_type":"X"}}
  %end = bf16[4,8]{1,0} fusion(%x), kind=kCustom, calls=%gather.2
  %fusion.39 = bf16[5,4]{1,0} fusion(%end), kind=kCustom, calls=%all-reduce-scatter.clone.1
  %collective-permute-start.1 = (bf16[1,8]{1,0}, bf16[1,8]{1,0}, u32[]{:S(2)}) collective-permute-start(%x), channel_id=8, source_target_pairs={{0,1},{1,0}}
  %collective-permute-done.1 = bf16[1,8]{1,0} collective-permute-done(%collective-permute-start.1)
}
%condition (p: (s32[], bf16[1,8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(3)
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}
%open_body (p: (s32[], f32[2])) -> (s32[], f32[2]) {
  %reduce = f32[2]{0} all-reduce(%x), channel_id=9, replica_groups=[1,8]<=[8], to_apply=%add
}
%open_condition (p: (s32[], f32[2])) -> pred[] {
  ROOT %lt.1 = pred[] compare(%i, %longest), direction=LT
}
ENTRY %main (a: f32[8]) -> f32[8] {
  %loop = (s32[], bf16[1,8]) while(%t), condition=%condition, body=%body
  %loop.1 = (s32[], f32[2]) while(%t), condition=%open_condition, body=%open_body
  %scatter = f32[2,16]{1,0} reduce-scatter(%g), channel_id=10, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, to_apply=%add
  %by_hand = bf16[8]{0} all-gather(%a), channel_id=7, replica_groups={{0,1}}, dimensions={0}, metadata={op_name="q_proj"}
  %by_hand.1 = bf16[8]{0} all-gather(%a), channel_id=7, replica_groups={{0,1}}, dimensions={0}, metadata={op_name="v_proj"}
  %recv.3 = (bf16[16,8]{1,0:T(8,128)(2,1)}, u32[], token[]) recv(%after-all.3), channel_id=1, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv.4 = (f32[8]{0}, u32[], token[]) recv(%after-all.4), channel_id=2, is_host_transfer=true
  %product = f32[8]{0} fusion(%a), kind=kOutput, calls=%fused, backend_config={"window_config":{"estimated_cycles":"1000"}}
  %both = (f32[4]{0}, bf16[6]{0}) all-reduce(%a, %b), channel_id=11, replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add
  %sum = f32[3]{0} all-reduce(%a), channel_id=12, replica_groups=mesh['a'=1,'b'=4,'c'=2], device_ids=([2,4]T(1,0)) {'b'}, use_global_device_ids=true, to_apply=%add
}
"""  # noqa: E501


def test_a_text_by_hand():
    collectives = read_collectives(TEXT, 8)
    found = {(c.kind, c.dtype, c.shape): c for c in collectives}
    every, even, first = tuple(range(8)), (0, 2, 4, 6), (0, 1, 2, 3)
    wanted = {
        ("all-gather", "bf16", (4, 8)): (even, 3, 3 * 64 * 3 / 4),  # group, runs, bytes received
        ("reduce-scatter", "bf16", (40, 4)): (every, 3, 3 * 320 * 7 / 8),
        ("collective-permute", "bf16", (1, 8)): (every, 3, 3 * 16),
        ("all-reduce", "f32", (2,)): (every, 1, 2 * 8 * 7 / 8),
        ("reduce-scatter", "f32", (8, 16)): (first, 1, 512 * 3 / 4),
        ("all-gather", "bf16", (8,)): ((0, 1), 1, 16 / 2),
        ("all-reduce", "f32", (4,)): (even, 1, 2 * 16 * 3 / 4),
        ("all-reduce", "bf16", (6,)): (even, 1, 2 * 12 * 3 / 4),
        ("all-reduce", "f32", (3,)): (first, 1, 2 * 12 * 3 / 4),
        ("between slices", "bf16", (16, 8)): (every, 1, 256),
    }
    assert {key: (c.group, c.runs, c.received) for key, c in found.items()} == wanted
    hidden = {key for key, c in found.items() if c.hidden}
    in_kernel, started = ("all-gather", "bf16", (4, 8)), ("collective-permute", "bf16", (1, 8))
    assert hidden == {in_kernel, started}
    assert found["all-gather", "bf16", (4, 8)].scope == "layers/up_proj"
    assert len(collectives) == len(wanted) + 1  # one channel, two names: two gathers


def test_cycles_of_kernels_count_as_often_as_their_loop_turns():
    assert kernel_cycles(TEXT) == 3 * 70 + 1000
    assert kernel_cycles(TEXT.replace('"1000"', f'"{2**63 - 1}"')) == 0  # not known


@pytest.mark.parametrize("layers", [2, 5])
def test_a_scanned_program_sends_what_its_layers_need(layers):
    """Every layer's weights are gathered once forward; the count follows the number of layers."""
    mesh = make_mesh()
    place = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))
    weights = jax.ShapeDtypeStruct((layers, 16, 16), jnp.float32, sharding=place(None, "fsdp"))
    x = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=place("fsdp"))

    def forward(weights, x):
        def layer(x, w):
            return jax.lax.with_sharding_constraint(jnp.tanh(x @ w), place("fsdp")), None

        return jax.lax.scan(layer, x, weights)[0]

    text = jax.jit(forward, out_shardings=place("fsdp")).lower(weights, x).compile().as_text()
    gathers = [c for c in read_collectives(text, 8) if c.kind == "all-gather"]
    assert sum(c.received for c in gathers) == layers * 16 * 16 * 4 * 7 / 8


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs the TPU compiler")
def test_a_scanned_gradient_on_a_tpu():
    """Weights gathered forward and backward, their gradients scattered, once a layer."""
    layers, width = 3, 1024
    mesh = make_mesh(devices=list(topology("v5e:2x4").devices))
    place = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))
    weights = place(None, "fsdp")
    shape = jax.ShapeDtypeStruct((layers, width, width), jnp.bfloat16, sharding=weights)
    x = jax.ShapeDtypeStruct((1024, width), jnp.bfloat16, sharding=place("fsdp"))

    def loss(weights, x):
        def layer(x, w):
            return jax.lax.with_sharding_constraint(jnp.tanh(x @ w), place("fsdp")), None

        return jnp.sum(jax.lax.scan(jax.checkpoint(layer), x, weights)[0].astype(jnp.float32))

    program = jax.jit(jax.grad(loss), out_shardings=weights).lower(shape, x).compile()
    received = collections.Counter()
    for c in read_collectives(program.as_text(), 8):
        received[c.kind] += c.received
    once = layers * width * width * 2 * 7 / 8
    assert received == {"all-gather": 2 * once, "reduce-scatter": once}


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs the TPU compiler")
def test_gradients_of_weights_are_scattered_in_bfloat16():
    """Twice the bytes otherwise, where several devices have a part of the sum each."""
    mesh = make_mesh(devices=list(topology("v5e:2x4").devices))
    place = lambda shape, *spec: jax.ShapeDtypeStruct(
        shape, jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec(*spec))
    )
    kernel, x = place((1024, 2048), "fsdp"), place((8, 128, 1024), "fsdp")
    total = lambda kernel, x: jnp.sum(matmul(x, kernel).astype(jnp.float32) ** 2)
    program = jax.jit(jax.grad(total), out_shardings=kernel.sharding).lower(kernel, x).compile()
    found = {(c.kind, c.dtype) for c in read_collectives(program.as_text(), 8)}
    assert found == {("all-gather", "bf16"), ("reduce-scatter", "bf16")}


def gathers_of_products(devices: str, platform: str) -> list:
    """The collectives of eight devices that multiply by sharded weights, layer after layer."""
    mesh = make_mesh(devices=list(topology(devices).devices))
    place = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))
    weights = jax.ShapeDtypeStruct((4, 4096, 4096), jnp.bfloat16, sharding=place(None, "fsdp"))
    x = jax.ShapeDtypeStruct((8 * 2048, 4096), jnp.bfloat16, sharding=place("fsdp"))

    def forward(weights, x):
        def layer(x, both):
            for w in both:
                x = jax.lax.with_sharding_constraint(x @ w, place("fsdp"))
            return x, None

        return jax.lax.scan(layer, x, weights)[0]

    program = jax.jit(forward).lower((weights, weights), x).compile(COMPILER_OPTIONS[platform])
    return read_collectives(program.as_text(), 8)


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs the TPU compiler")
@pytest.mark.parametrize(("slice_of", "hidden"), [("v5e:2x4", True), ("v6e:2x4", False)])
def test_what_gathers_wait_for(slice_of, hidden):
    """The compiler gathers weights behind products on v5e, and on v6e before them."""
    found = gathers_of_products(slice_of, "tpu")
    assert {c.kind for c in found} == {"all-gather"}
    assert any(c.hidden for c in found) == hidden


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs the TPU compiler")
@pytest.mark.parametrize("with_lora", [False, True])
def test_a_tpu_copies_no_heads(with_lora):
    """Nothing of a layer moves queries, keys, values or their gradients to another layout.

    A layer with a reshape between products and heads copies each twice, 7% of its kernels' time.
    """
    device = topology("v5e:1x1").devices[0]
    config = dataclasses.replace(
        preset("llava-1.5-7b").decoder,
        hidden_size=768, intermediate_size=1536, num_heads=8, num_kv_heads=8, num_layers=2,
    )  # fmt: skip
    decoder = Decoder(config, jnp.bfloat16, "full", "splash")
    place = lambda shape, dtype: jax.ShapeDtypeStruct(
        shape, dtype, sharding=SingleDeviceSharding(device)
    )
    rows, ids = place((2, 2048, 768), jnp.bfloat16), place((2, 2048), jnp.int32)
    params = {"decoder": jax.eval_shape(decoder.init, jax.random.key(0), rows, ids, ids)["params"]}
    lora = LoraConfig(16, 16.0, ("decoder/layers/*",), dropout=0.05)
    if with_lora:
        params["lora"] = abstract_lora(lora, params)
    params = jax.tree.map(lambda leaf: place(leaf.shape, jnp.bfloat16), nn.meta.unbox(params))

    def loss(trained, params, x, ids, keys):
        params = {**params, **trained}
        if with_lora:
            params = attach_lora(params, lora, jax.random.wrap_key_data(keys))
        hidden = decoder.apply({"params": params["decoder"]}, x, ids, ids)
        return jnp.sum(hidden.astype(jnp.float32) ** 2)

    part = "lora" if with_lora else "decoder"
    trained, keys = {part: params.pop(part)}, place((2, 2), jnp.uint32)
    lowered = jax.jit(jax.grad(loss, (0, 2))).lower(trained, params, rows, ids, keys)
    text = lowered.compile().as_text()
    computations, runs = read_program(text)
    heads = re.compile(r"bf16\[2,(2048,8,128|8,2048,128|2048,1024)\]")
    in_layers = [line for name, lines in computations.items() if runs[name] == 2 for line in lines]
    assert any("splash" in line for line in in_layers)
    assert [r for r, code, _ in instructions(in_layers) if code == "copy" and heads.search(r)] == []
