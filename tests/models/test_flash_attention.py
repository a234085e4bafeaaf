"""Flash attention gives what plain attention gives; the choice among implementations is told."""

import contextlib
import dataclasses
import math
import re
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from llava_jax.models.attention import attention, attention_mask, choose_attention
from llava_jax.models.decoder import Decoder
from llava_jax.models.flash_attention import PackedCausal, cudnn_attention, splash_attention
from llava_jax.models.presets import preset
from llava_jax.parallel.mesh import make_mesh
from llava_jax.parallel.sharding import RULES
from tests.tiny_model import DECODER

T = 256


def packed_row(lengths: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(segment ids, positions) of one row of T: segments of these lengths, then padding."""
    segments, positions = np.zeros(T, np.int32), np.zeros(T, np.int32)
    start = 0
    for number, length in enumerate(lengths, 1):
        segments[start : start + length] = number
        positions[start : start + length] = np.arange(length)
        start += length
    return segments, positions


SEGMENTS, POSITIONS = (
    np.stack(arrays) for arrays in zip(packed_row((100, 120)), packed_row((7, 249)), strict=True)
)


def draw(heads: int, size: int, seed: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (2, T, heads, size), jnp.float32)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "window"), [(4, 2, 64, None), (2, 2, 128, 50), (3, 1, 16, None)]
)
def test_splash_gives_what_xla_gives(heads, kv_heads, size, window):
    """Values and gradients: packed segments, padding, grouped heads, sliding window."""
    query, key, value = draw(heads, size, 0), draw(kv_heads, size, 1), draw(kv_heads, size, 2)
    dense = attention_mask(POSITIONS, POSITIONS, SEGMENTS, SEGMENTS, window)
    packed = PackedCausal(jnp.asarray(SEGMENTS), window)
    cotangent = draw(heads, size, 3) * (SEGMENTS != 0)[..., None, None]  # padding is never used

    def with_gradients(attend):
        out, pullback = jax.vjp(attend, query, key, value)
        return [out * (SEGMENTS != 0)[..., None, None], *pullback(cotangent)]

    with jax.default_matmul_precision("highest"):
        wanted = with_gradients(lambda *qkv: attention(*qkv, dense))
        given = with_gradients(lambda *qkv: splash_attention(*qkv, packed, interpret=True))
    for a, b in zip(wanted, given, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_no_probability_crosses_a_segment():
    """Values of one segment do not change a bit of another's result."""
    query, key, value = (draw(2, 32, seed) for seed in range(3))
    packed = PackedCausal(jnp.asarray(SEGMENTS))
    attend = jax.jit(lambda v: splash_attention(query, key, v, packed, interpret=True))
    first = (SEGMENTS == 1)[..., None, None]
    before, after = attend(value), attend(jnp.where(first, 1e4, value))
    others = SEGMENTS > 1
    np.testing.assert_array_equal(np.asarray(before)[others], np.asarray(after)[others])
    assert not np.array_equal(np.asarray(before)[SEGMENTS == 1], np.asarray(after)[SEGMENTS == 1])


@pytest.mark.parametrize(("tensor", "heads"), [(1, 4), (4, 4), (4, 8)])
def test_splash_over_a_mesh_gives_what_one_device_gives(tensor, heads):
    """Rows over fsdp, heads over tensor, also with fewer kv heads than shards."""
    query, key, value = draw(heads, 32, 0), draw(2, 32, 1), draw(2, 32, 2)
    packed = PackedCausal(jnp.asarray(SEGMENTS))
    attend = jax.jit(lambda *qkv: splash_attention(*qkv, packed, interpret=True))
    alone = attend(query, key, value)

    mesh = make_mesh(fsdp=2, tensor=tensor, devices=jax.devices()[: 2 * tensor])
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        spread = jax.jit(lambda *qkv: splash_attention(*qkv, packed, interpret=True))
        np.testing.assert_allclose(alone, spread(query, key, value), atol=1e-6)


def cudnn_calls(text: str) -> list[tuple[list, list]]:
    """(shapes of operands, shapes of results) of each call of cuDNN in a lowered program."""
    shapes = lambda types: [tuple(map(int, s.split("x"))) for s in re.findall(r"<([\dx]+)x", types)]
    calls = re.findall(r"custom_call @__cudnn.* : \((.*)\) -> \((.*)\)", text)
    return [(shapes(operands), shapes(results)) for operands, results in calls]


@pytest.mark.parametrize(
    ("mesh", "heads", "kv_heads", "on_a_device"),
    [
        (None, 4, 2, (2, 4, 2)),  # rows, heads, kv heads
        ({"fsdp": 2}, 4, 2, (1, 4, 2)),
        ({"fsdp": 2, "tensor": 2}, 4, 2, (1, 2, 1)),
        ({"fsdp": 1, "tensor": 4}, 8, 2, (2, 2, 1)),  # fewer kv heads than shards
        ({"fsdp": 1, "tensor": 4}, 4, 1, (2, 1, 1)),
    ],
)
def test_cudnn_is_called_on_each_shard_without_a_gradient_of_the_mask(
    monkeypatch, mesh, heads, kv_heads, on_a_device
):
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    dense = attention_mask(POSITIONS, POSITIONS, SEGMENTS, SEGMENTS)
    shape = lambda count: jax.ShapeDtypeStruct((2, T, count, 64), jnp.bfloat16)
    total = lambda *qkv: jnp.sum(cudnn_attention(*qkv, dense).astype(jnp.float32))
    traced = jax.jit(jax.grad(total, (0, 1, 2)))
    with contextlib.ExitStack() as scope:
        if mesh:
            devices = jax.devices()[: math.prod(mesh.values())]
            scope.enter_context(jax.set_mesh(make_mesh(**mesh, devices=devices)))
            scope.enter_context(nn.logical_axis_rules(RULES))
        traced = traced.trace(shape(heads), shape(kv_heads), shape(kv_heads))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    rows, of_query, of_key = on_a_device
    heads = (of_query, of_key, of_key)
    (operands, _), (_, results) = cudnn_calls(text)
    assert operands == [*((rows, T, n, 64) for n in heads), (rows, 1, T, T)]
    assert results == [*((rows, n, T, 64) for n in heads), (0,)]  # gradients and the workspace


def device(kind: str) -> types.SimpleNamespace:
    """A device by platform, or by the compute capability of a GPU."""
    if kind in ("tpu", "cpu"):
        return types.SimpleNamespace(platform=kind)
    return types.SimpleNamespace(platform="gpu", compute_capability=kind)


def choose(name, kind, dtype="bfloat16", length=2048, turns=False, shards=1, **decoder):
    decoder = dataclasses.replace(preset("llava-1.5-7b").decoder, **decoder)
    return choose_attention(name, device(kind), shards, dtype, decoder, length, turns)


@pytest.mark.parametrize(
    ("kind", "settings", "chosen", "reason"),
    [
        ("tpu", {}, "splash", ""),
        ("tpu", {"turns": True}, "xla", "independent turns"),
        ("tpu", {"length": 2000}, "xla", "multiple of 128"),
        ("tpu", {"num_heads": 9, "shards": 2}, "xla", "must divide 9 heads"),
        ("8.0", {"length": 2000, "turns": True}, "cudnn", ""),
        ("9.0", {"num_heads": 32, "num_kv_heads": 2, "shards": 4}, "cudnn", ""),
        ("9.0", {"num_heads": 9, "shards": 2}, "xla", "must divide 9 heads"),
        ("9.0", {"length": 255}, "xla", "must be even"),
        ("9.0", {"head_dim": 256}, "cudnn", ""),
        ("10.0", {"head_dim": 256}, "cudnn", ""),
        ("9.0", {"head_dim": 264}, "xla", "up to 256"),
        ("8.0", {"head_dim": 256}, "xla", "up to 128"),
        ("8.0", {"head_dim": 84}, "xla", "multiple of 8"),
        ("7.5", {}, "xla", "Ampere"),
        ("gfx942", {}, "xla", "NVIDIA"),
        ("9.0", {"dtype": "float32"}, "xla", "bfloat16"),
        ("cpu", {}, "xla", ""),
        ("cpu", {"length": 4096}, "blocks", ""),
        ("cpu", {"length": 4000}, "xla", ""),
        ("cpu", {"length": 4096, "num_heads": 9, "shards": 2}, "xla", ""),
        ("tpu", {"length": 4096, "turns": True}, "xla", "independent turns"),
    ],
)
def test_auto_takes_the_kernel_that_can_do_the_work(kind, settings, chosen, reason):
    """And names the reason if it cannot, which naming the kernel outright would fail with."""
    taken, refused = choose("auto", kind, **settings)
    assert taken == chosen and reason in refused and bool(reason) == bool(refused)
    assert choose("xla", kind, **settings) == ("xla", "")
    if refused:
        kernel, reasons = refused.split(": ", 1)
        with pytest.raises(ValueError, match=re.escape(reasons)):
            choose(kernel, kind, **settings)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("splash", "independent turns"), ("cudnn", "NVIDIA GPUs"), ("blocks", "multiple of 512")],
)
def test_an_implementation_that_cannot_do_the_work_is_refused(name, reason):
    with pytest.raises(ValueError, match=reason):
        choose(name, "tpu", turns=True, length=4000)


@pytest.mark.parametrize("shape", [(256, 8, 128), (255, 8, 128), (256, 8, 84), (256, 8, 256)])
def test_jax_refuses_the_rows_and_heads_that_auto_avoids(monkeypatch, shape):
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    is_hopper = lambda least: False
    monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", is_hopper)
    length, heads, size = shape
    x = jax.ShapeDtypeStruct((1, length, heads, size), jnp.bfloat16)
    mask = jax.ShapeDtypeStruct((1, 1, length, length), bool)
    total = lambda q, mask: jnp.sum(cudnn_attention(q, q, q, mask).astype(jnp.float32))
    chosen, _ = choose("auto", "8.0", length=length, head_dim=size)
    refusal = contextlib.nullcontext() if chosen == "cudnn" else pytest.raises(NotImplementedError)
    with refusal:
        jax.eval_shape(jax.grad(total), x, mask)


def test_the_decoder_refuses_turns_that_splash_would_ignore():
    ids = jnp.zeros((1, T), jnp.int32)
    model = Decoder(DECODER, attention="splash")
    with pytest.raises(ValueError, match="turns"):
        embeddings = jnp.zeros((1, T, DECODER.hidden_size))
        model.init(jax.random.key(0), embeddings, ids, ids, turn_ids=ids)
