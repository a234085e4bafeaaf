"""Dry runs for NVIDIA GPUs: what is read from a program, a card's share, real compiles."""

import importlib
import importlib.util
import json
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from llava_jax.dry_run import run as dry_run
from llava_jax.dry_run.chips import CHIPS, GIB
from llava_jax.dry_run.collectives import read_collectives
from llava_jax.dry_run.gpu import cudnn_workspace, usable_share
from llava_jax.dry_run.report import share_of_a_card
from llava_jax.dry_run.topology import Topology, topology
from llava_jax.errors import LlavaError
from llava_jax.models.attention import attention_mask
from llava_jax.models.flash_attention import cudnn_attention
from llava_jax.parallel.mesh import make_mesh
from llava_jax.parallel.sharding import RULES
from tests import tiny_run
from tests.dry_run.test_collectives import gathers_of_products

HAS_COMPILER = importlib.util.find_spec("jax_plugins") and importlib.util.find_spec(
    "jax_plugins.xla_cuda13"
)
with_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="needs the compiler for NVIDIA GPUs")

# As the GPU compiler writes: a loop whose condition is a kernel and whose turns are written down;
# in it a gather that hides and one that waits; after it a scatter of two arrays in one call.
TEXT = """\
HloModule step
%body (p: (s32[], bf16[1,8])) -> (s32[], bf16[1,8]) {
  %all-gather-start = (bf16[1,8]{1,0}, bf16[8,8]{1,0}) all-gather-start(%x), channel_id=1, replica_groups=mesh['axis_0'=8,'axis_1'=1] {'axis_0'}, dimensions={0}, use_global_device_ids=true, backend_config={"collective_backend_config":{"is_sync":false,"is_pipelined":false}}
  %all-gather-done = bf16[8,8]{1,0} all-gather-done(%all-gather-start)
  %all-gather-start.1 = (bf16[2,8]{1,0}, bf16[16,8]{1,0}) all-gather-start(%y), channel_id=2, replica_groups=mesh['axis_0'=8,'axis_1'=1] {'axis_0'}, dimensions={0}, use_global_device_ids=true, backend_config={"collective_backend_config":{"is_sync":true,"is_pipelined":false}}
  %all-gather-done.1 = bf16[16,8]{1,0} all-gather-done(%all-gather-start.1)
}
%condition (p: (s32[], bf16[1,8])) -> pred[] {
  ROOT %loop_compare_fusion = pred[] fusion(%i), kind=kLoop, calls=%fused_compare
}
ENTRY %main (a: f32[8]) -> f32[8] {
  %while.1 = (s32[], bf16[1,8]{1,0}, /*index=2*/bf16[4]{0}) while(%tuple), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"32"},"known_init_step":{"init":"0","step":"1"}}
  %reduce-scatter-start = ((bf16[16,8]{1,0}, bf16[16,2,4]{2,1,0}), (bf16[2,8]{1,0}, bf16[2,2,4]{2,1,0})) reduce-scatter-start(%g, /*index=1*/%h), channel_id=3, replica_groups=mesh['axis_0'=1,'axis_1'=8] {'axis_1'}, use_global_device_ids=true, dimensions={0}, to_apply=%add, backend_config={"collective_backend_config":{"is_sync":false}}
  %reduce-scatter-done = (bf16[2,8]{1,0}, bf16[2,2,4]{2,1,0}) reduce-scatter-done(%reduce-scatter-start)
}
"""  # noqa: E501


def test_collectives_of_a_text_by_hand():
    found = {(c.kind, c.shape): (c.runs, c.received, c.hidden) for c in read_collectives(TEXT, 8)}
    assert found == {
        ("all-gather", (8, 8)): (32, 32 * 128 * 7 / 8, True),
        ("all-gather", (16, 8)): (32, 32 * 256 * 7 / 8, False),
        ("reduce-scatter", (16, 8)): (1, 256 * 7 / 8, True),
        ("reduce-scatter", (16, 2, 4)): (1, 256 * 7 / 8, True),
    }


def backward_call(batch, heads, kv_heads, size, length, of_the_mask: bool) -> str:
    array = lambda *shape: f"bf16[{','.join(map(str, shape))}]{{3,1,2,0}}"
    results = [array(batch, n, length, size) for n in (heads, kv_heads, kv_heads)]
    results += [array(batch, 1, length, length)] * of_the_mask + ["u8[0]{0}"]
    return (
        "ENTRY %main (a: f32[8]) -> f32[8] {\n"
        f"  %bwd.1 = ({', '.join(results)}) custom-call(%q, %k), "
        'custom_call_target="__cudnn$fmhaScaleBiasSoftmaxBackward"\n}\n'
    )


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "length", "of_the_mask", "capability", "mib"),
    [
        (32, 32, 128, 2048, True, "9.0", 1025),
        (32, 32, 128, 2048, False, "9.0", 129),
        (32, 32, 128, 2048, False, "8.0", 257),
        (32, 8, 128, 2048, True, "9.0", 1153),
        (9, 3, 64, 1024, True, "9.0", 81),
        (40, 40, 128, 2048, True, "9.0", 1281),
        (32, 32, 80, 2048, True, "9.0", 1025),
        (14, 2, 64, 2048, True, "9.0", 476),
    ],
)
def test_the_workspace_is_what_cudnn_asks_for(
    heads, kv_heads, size, length, of_the_mask, capability, mib
):
    """Against the plans of cuDNN 9.28.1 for four rows, asked for described cards."""
    text = backward_call(4, heads, kv_heads, size, length, of_the_mask)
    assert cudnn_workspace(text, capability) / 2**20 == pytest.approx(mib, abs=1)
    assert cudnn_workspace(TEXT, capability) == 0


@pytest.mark.parametrize(
    ("text", "share"), [(None, 0.75), ("0.9", 0.9), ("1", 1.0), ("0", None), ("all", None)]
)
@pytest.mark.parametrize("variable", ["XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"])
def test_the_share_of_a_cards_memory(monkeypatch, variable, text, share):
    if text is not None:
        monkeypatch.setenv(variable, text)
    if share is None:
        with pytest.raises(LlavaError, match=variable):
            topology("h200:1")  # before anything is compiled, with or without the compiler
        return
    assert usable_share() == share
    monkeypatch.setattr("llava_jax.dry_run.topology.gpu_devices", lambda *_: (None,))
    where = topology("h200:1")
    assert where.usable == int(share * CHIPS["h200"].hbm)


@pytest.mark.parametrize(
    ("needed", "advice"),
    [(50, ""), (70, "; with export XLA_CLIENT_MEM_FRACTION=0.89 the step fits"), (78, "")],
)
def test_the_share_that_a_step_needs(needed, advice):
    hbm = CHIPS["h100"].hbm
    sizes = {"needed": needed * GIB, "usable": int(0.75 * hbm), "hbm": hbm}
    assert share_of_a_card(sizes) == f" (JAX takes 75% of the card's 79.11{advice})"
    assert share_of_a_card(sizes | {"usable": hbm}) == ""


def cards(*hosts: int) -> list:
    return [types.SimpleNamespace(process_index=host) for host in hosts]


@pytest.mark.parametrize(
    ("kind", "members", "rate"),
    [
        ("h100", cards(0) * 8, 4.5e11),
        ("a100", cards(1, 1), 3e11),
        ("h100", cards(0), np.inf),
        ("h100", cards(*[0] * 8, *[1] * 8), 8 * 5e10),
        ("h100", cards(0, 1), 5e10),  # as the other seven pairs do at the same time
        ("a100", cards(*[0] * 8, *[1] * 8), 8 * 2.5e10),
    ],
)
def test_bandwidth_into_a_card(kind, members, rate):
    where = Topology(f"2x{kind}:8", tuple(members), (8,), CHIPS[kind])
    assert where.bandwidth(members) == rate


@pytest.mark.skipif(bool(HAS_COMPILER), reason="the compiler is here")
def test_without_the_compiler_the_command_that_installs_it_is_named():
    with pytest.raises(LlavaError, match=f"pip install jax-cuda13-pjrt=={jax.__version__}"):
        topology("h100:8")


@with_compiler
@pytest.mark.parametrize("kind", ["a100", "h100", "h200", "b200"])
def test_cards_of_two_hosts(kind):
    where = topology(f"2x{kind}:4")
    assert [d.process_index for d in where.devices] == [0] * 4 + [1] * 4
    device = where.devices[0]
    chip = CHIPS[kind]
    assert (device.platform, device.device_kind) == ("gpu", chip.kind)
    assert device.compute_capability == chip.capability and device.core_count == chip.cores


@with_compiler
def test_a_scanned_gradient_on_gpus():
    """Weights gathered forward and backward, their gradients scattered, once a layer."""
    layers, width = 3, 4096
    mesh = make_mesh(devices=list(topology("h100:8").devices))
    place = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))
    weights = place(None, "fsdp")
    shape = jax.ShapeDtypeStruct((layers, width, width), jnp.bfloat16, sharding=weights)
    x = jax.ShapeDtypeStruct((8 * 512, width), jnp.bfloat16, sharding=place("fsdp"))

    def loss(weights, x):
        def layer(x, w):
            return jax.lax.with_sharding_constraint(jnp.tanh(x @ w), place("fsdp")), None

        return jnp.sum(jax.lax.scan(jax.checkpoint(layer), x, weights)[0].astype(jnp.float32))

    program = jax.jit(jax.grad(loss), out_shardings=weights).lower(shape, x).compile()
    received = {kind: 0.0 for kind in ("all-gather", "reduce-scatter")}
    for c in read_collectives(program.as_text(), 8):
        received[c.kind] += c.received
    once = layers * width * width * 2 * 7 / 8
    assert received == {"all-gather": 2 * once, "reduce-scatter": once}


@with_compiler
@pytest.mark.parametrize("kind", ["a100", "h100", "b200"])
def test_gathers_hide_behind_products(kind):
    found = gathers_of_products(f"{kind}:8", "gpu")
    assert {c.kind for c in found} == {"all-gather"} and any(c.hidden for c in found)


@with_compiler
@pytest.mark.parametrize(
    ("tensor", "heads", "kv_heads", "mib"), [(1, 4, 2, 3), (2, 8, 1, 3), (4, 8, 2, 2)]
)
def test_cudnn_attention_compiles_on_every_shard(tensor, heads, kv_heads, mib):
    """With fewer kv heads than shards too; the workspace holds no gradient of the mask."""
    length, size = 512, 64
    devices = topology(f"h100:{2 * tensor}").devices
    mesh = make_mesh(fsdp=2, tensor=tensor, devices=list(devices))
    place = lambda shape, dtype, *spec: jax.ShapeDtypeStruct(
        shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec))
    )
    x = lambda n: place((4, length, n, size), jnp.bfloat16, "fsdp")
    ids = place((4, length), jnp.int32, "fsdp")

    def total(q, k, v, ids):
        mask = attention_mask(ids, ids, ids, ids)
        return jnp.sum(cudnn_attention(q, k, v, mask).astype(jnp.float32))

    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        lowered = jax.jit(jax.grad(total, (0, 1, 2))).lower(x(heads), x(kv_heads), x(kv_heads), ids)
        text = lowered.compile().as_text()
    assert cudnn_workspace(text, "9.0") == pytest.approx(mib * 2**20, abs=2**19)


@pytest.mark.slow
@with_compiler
@pytest.mark.parametrize(("length", "attention"), [(64, "cudnn"), (63, "xla")])
def test_the_fastest_setting_of_a_tiny_stage(world, tmp_path, capsys, length, attention):
    """Rows that cuDNN refuses take XLA's attention, and the report says why."""
    changes = {"batch_size": 4, "data.max_length": length, "model.dtype": "bfloat16"}
    values = tiny_run.align(world, tmp_path / "run", changes)
    assert dry_run.run(tiny_run.recipe({}, values), "2xh100:1", True) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    figures = json.loads(last)
    assert figures["attention"] == attention
    assert any("not cudnn: a row's length must be even" in line for line in lines) == (length == 63)
    assert (figures["bytes"]["cudnn_workspace"] > 0) == (attention == "cudnn")
    assert figures["fit"]["best"]["fits"] and figures["estimate"]["seconds"]["collectives"] > 0
    assert figures["bytes"]["usable"] == int(0.75 * figures["bytes"]["hbm"])


@pytest.mark.slow
@with_compiler
def test_7b_fits_eight_cards_with_every_gather_hidden(capsys):
    config = importlib.import_module("configs.llava15_7b_instruct").get_config()
    assert dry_run.run(config, "h100:8", False) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["attention"] == "cudnn" and figures["waiting_bytes"] < 1e6
    sizes = figures["bytes"]
    assert sizes["needed"] < 21 * GIB and 0 < sizes["cudnn_workspace"] < 0.2 * GIB
    assert figures["collective_bytes"] < figures["fsdp"]["least"]
