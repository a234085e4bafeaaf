"""Flash attention gives what plain attention gives; the choice among implementations is told."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax.models.attention import attention, attention_mask, choose_attention
from llava_jax.models.decoder import Decoder
from llava_jax.models.flash_attention import PackedCausal, splash_attention
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


@pytest.mark.parametrize("tensor", [1, 4])
def test_splash_over_a_mesh_gives_what_one_device_gives(tensor):
    """Rows over fsdp, heads over tensor, also with fewer kv heads than shards."""
    query, key, value = draw(4, 32, 0), draw(2, 32, 1), draw(2, 32, 2)
    packed = PackedCausal(jnp.asarray(SEGMENTS))
    attend = jax.jit(lambda *qkv: splash_attention(*qkv, packed, interpret=True))
    alone = attend(query, key, value)

    mesh = make_mesh(fsdp=2, tensor=tensor, devices=jax.devices()[: 2 * tensor])
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        spread = jax.jit(lambda *qkv: splash_attention(*qkv, packed, interpret=True))
        np.testing.assert_allclose(alone, spread(query, key, value), atol=1e-6)


@pytest.mark.parametrize(
    ("platform", "dtype", "length", "turns", "chosen"),
    [
        ("tpu", "bfloat16", 2048, False, "splash"),
        ("tpu", "bfloat16", 2048, True, "xla"),
        ("tpu", "bfloat16", 2000, False, "xla"),
        ("gpu", "bfloat16", 2000, True, "cudnn"),
        ("gpu", "float32", 2048, False, "xla"),
        ("cpu", "bfloat16", 2048, False, "xla"),
    ],
)
def test_auto_takes_the_kernel_that_can_do_the_work(platform, dtype, length, turns, chosen):
    assert choose_attention("auto", platform, dtype, length, turns) == chosen
    assert choose_attention("xla", platform, dtype, length, turns) == "xla"


@pytest.mark.parametrize(
    ("name", "reason"), [("splash", "independent turns"), ("cudnn", "NVIDIA GPUs")]
)
def test_an_implementation_that_cannot_do_the_work_is_refused(name, reason):
    with pytest.raises(ValueError, match=reason):
        choose_attention(name, "tpu", "bfloat16", 2048, True)


def test_the_decoder_refuses_turns_that_splash_would_ignore():
    ids = jnp.zeros((1, T), jnp.int32)
    model = Decoder(DECODER, attention="splash")
    with pytest.raises(ValueError, match="turns"):
        embeddings = jnp.zeros((1, T, DECODER.hidden_size))
        model.init(jax.random.key(0), embeddings, ids, ids, turn_ids=ids)
