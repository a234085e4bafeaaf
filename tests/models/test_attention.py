"""The XLA attention's hand-written gradients, rotary embeddings, and transposes."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax.models import cached_attention as module
from llava_jax.models.attention import attention, attention_mask
from llava_jax.models.blocked_attention import blocked_attention
from llava_jax.models.cached_attention import cached_attention
from llava_jax.models.decoder import _rotated_by_halves, _rotated_by_product, apply_rope
from llava_jax.models.linear import transposed
from llava_jax.parallel.mesh import make_mesh
from llava_jax.parallel.sharding import RULES

RNG = np.random.default_rng(0)


def normal(*shape) -> jax.Array:
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


Q, K, V = normal(2, 6, 4, 8), normal(2, 6, 2, 8), normal(2, 6, 2, 8)
MASK = jnp.tril(jnp.ones((6, 6), bool))[None, None].repeat(2, 0)
WEIGHTS = normal(2, 6, 4, 8)


def plain(q, k, v):
    k, v = (jnp.repeat(x, 2, axis=2) for x in (k, v))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) / 8**0.5
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(jnp.where(MASK, scores, -1e30)), v)


def gradients(function):
    return jax.jit(jax.grad(lambda *x: jnp.sum(function(*x) * WEIGHTS), (0, 1, 2)))(Q, K, V)


@pytest.mark.parametrize(("precision", "tolerance"), [("highest", 1e-5), ("bfloat16", 0.05)])
def test_gradients_are_those_of_the_plain_formula(precision, tolerance):
    wanted = gradients(plain)
    with jax.default_matmul_precision(precision):
        found = gradients(lambda q, k, v: attention(q, k, v, MASK))
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, atol=tolerance * float(abs(b).max()))


def test_a_chunk_over_blocks_of_keys_is_a_whole_row(monkeypatch):
    """A causal row, one that begins late, one in a window, and one whose queries see one key."""
    monkeypatch.setattr(module, "LONG_ROW", 4)
    monkeypatch.setattr(module, "BLOCK", 4)
    q, k, v = normal(4, 6, 4, 8), normal(4, 16, 2, 8), normal(4, 16, 2, 8)
    k = k.at[1, 10:].set(np.nan).at[2, :4].set(np.nan)  # whole blocks that are never read
    k = k.at[1, 10:12].set(0.0)
    places, keys = np.arange(6)[:, None], np.arange(16)
    mask = np.stack([
        keys <= places,
        keys <= places + 4,
        (keys <= places + 8) & (keys > places + 5),
        (keys == 0) & (places >= 0),
    ])[:, None]  # fmt: skip
    tables = RNG.permutation(32).reshape(4, 8)  # pages of two slots
    paged = lambda x: jnp.zeros((32, 2, 2, 8)).at[tables].set(x.reshape(4, 8, 2, 2, 8))

    def reader(k, v):
        def read(tables):  # [32, 2, K, H] -> [B, K, 2 * pages, H]
            some = lambda pool: pool[tables].reshape(len(tables), -1, 2, 8).swapaxes(1, 2)
            return some(paged(k)), some(paged(v))

        return read

    arguments = q, jnp.asarray(tables), jnp.asarray(mask)
    by_row = lambda *x: cached_attention(*x, reader(k, v))
    expected = attention(q, jnp.nan_to_num(k), v, arguments[2])
    np.testing.assert_allclose(by_row(*arguments), expected, rtol=1e-5, atol=1e-6)
    assert " while[" in str(jax.make_jaxpr(by_row)(*arguments))
    monkeypatch.undo()  # all rows at once
    monkeypatch.setattr(module, "FEWEST_KEYS", 2)
    arguments = q, jnp.asarray(tables), jnp.asarray(mask & (keys < 10) | (keys == 0))
    expected = attention(q, jnp.nan_to_num(k), v, arguments[2])
    last = jnp.nan_to_num(k).at[:, 10:].set(np.nan)  # what no row looks at is never read
    for fast, held in ((1, last), (2**30, jnp.nan_to_num(k))):
        monkeypatch.setitem(module.FAST_BYTES, "cpu", fast)
        found = cached_attention(*arguments, reader(held, v))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def packed_row(*lengths, window=None, turns=None) -> jax.Array:
    """The mask [1, 1, T, T] of a row with conversations of these lengths."""
    segments = np.repeat(np.arange(1, len(lengths) + 1), lengths)[None]
    positions = np.concatenate([np.arange(length) for length in lengths])[None]
    return jnp.asarray(attention_mask(positions, positions, segments, segments, window, turns))


ROWS = {
    "one": packed_row(96),
    "packed": packed_row(10, 62, 24),
    "window": packed_row(96, window=7),
    "turns": packed_row(96, turns=(np.arange(96) // 20)[None]),
}


def in_blocks(mask):
    return lambda *x: blocked_attention(*x, mask, (32, 16))


def with_gradients(attend, q, k, v, weights):
    out, pullback = jax.jit(lambda *x: jax.vjp(attend, *x))(q, k, v)
    return [out, *pullback(weights)]


def row_of(heads: int, kv_heads: int, dtype=jnp.float32) -> list[jax.Array]:
    """Query, key, value and the weights of the result's elements in a sum."""
    return [normal(1, 96, n, 8).astype(dtype) for n in (heads, kv_heads, kv_heads, heads)]


@pytest.mark.parametrize(
    ("name", "heads"),
    [("one", (4, 2)), ("packed", (3, 3)), ("window", (4, 1)), ("turns", (4, 2))],
)
def test_a_row_in_blocks_is_a_whole_row_with_its_gradients(name, heads):
    row = row_of(*heads)
    wanted = with_gradients(lambda *x: attention(*x, ROWS[name]), *row)
    found = with_gradients(in_blocks(ROWS[name]), *row)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6 * float(abs(b).max()) + 1e-6)


def test_blocks_that_nothing_attends_to_are_not_read_and_no_scores_are_kept():
    q, k, v, _ = row_of(4, 2)
    later = k.at[:, 64:].set(np.nan)  # the blocks of the first conversation do not touch it
    out, pullback = jax.vjp(in_blocks(packed_row(64, 32)), q, later, v)
    d_q, d_k, _ = pullback(jnp.ones_like(q))
    for found in (out, d_q, d_k):
        assert np.isfinite(found[:, :64]).all()
    assert max(x.size for x in jax.tree.leaves(pullback)) <= 96 * 96  # the mask, of one head


@pytest.mark.parametrize("precision", ["bfloat16", None])
def test_blocks_in_bfloat16(precision):
    """As near to float32 as a whole row is."""
    row = row_of(4, 2, jnp.float32 if precision else jnp.bfloat16)
    exact = [x.astype(jnp.float32) for x in row]
    wanted = with_gradients(lambda *x: attention(*x, ROWS["packed"]), *exact)
    with jax.default_matmul_precision(precision or "highest"):
        found = with_gradients(in_blocks(ROWS["packed"]), *row)
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == row[0].dtype
        np.testing.assert_allclose(np.float32(a), b, atol=0.05 * float(abs(b).max()))


def test_a_tower_that_sees_tile_by_tile_is_one_that_sees_all_at_once():
    q, k, v, weights = (normal(3, 7, 2, 8) for _ in range(4))
    both = [
        jax.vjp(lambda *x, how=how: attention(*x, implementation=how), q, k, v)
        for how in ("xla", "blocks")
    ]
    wanted, found = ([out, *pullback(weights)] for out, pullback in both)
    for a, b in zip(wanted, found, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_blocks_over_a_mesh_are_those_of_one_device():
    q, k, v, weights = (normal(2, 512, n, 8) for n in (4, 2, 2, 4))
    mask = jnp.concatenate([packed_row(512), packed_row(200, 312)])
    graded = lambda *x: jax.grad(lambda *x: jnp.sum(attention(*x, mask, "blocks") * weights))(*x)
    alone = jax.jit(graded)(q, k, v)
    mesh = make_mesh(fsdp=2, tensor=4, devices=jax.devices()[:8])
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        np.testing.assert_allclose(jax.jit(graded)(q, k, v), alone, atol=1e-6)


@pytest.mark.parametrize("heads", [4, 6])
def test_a_device_sees_its_own_tiles_alone(heads):
    """Rows over data and fsdp; heads over tensor, or whole where its devices do not divide them."""
    q, k, v, weights = (normal(4, 7, heads, 8) for _ in range(4))
    total = lambda *x: jnp.sum(attention(*x, implementation="blocks") * weights)
    graded = jax.jit(jax.grad(total, (0, 1, 2)))
    alone = graded(q, k, v)
    mesh = make_mesh(data=1, fsdp=2, tensor=4, devices=jax.devices()[:8])
    rows = jax.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        spread = jax.jit(jax.grad(total, (0, 1, 2)), in_shardings=(rows,) * 3)
        for found, wanted in zip(spread(q, k, v), alone, strict=True):
            np.testing.assert_allclose(found, wanted, atol=1e-6)
        text = spread.lower(q, k, v).compile().as_text()
    tiles = {int(n) for n in re.findall(r"f32\[(\d+),7,\d+,8\]\S* all-gather", text)}
    assert 4 not in tiles, "all tiles on each device"


def transposed_product(x, y):
    return transposed(x.astype(jnp.bfloat16)) @ y.astype(jnp.bfloat16)


def test_in_mixed_precision_a_transpose_is_a_copy_on_one_device_only():
    x, y = normal(64, 16), normal(64, 32)
    lowered = {}
    for devices in (1, 2):
        mesh = jax.make_mesh(
            (devices,), ("data",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:devices]
        )
        with jax.set_mesh(mesh), jax.default_matmul_precision("bfloat16"):
            lowered[devices] = jax.jit(transposed_product).lower(x, y).as_text()
    lowered["float32"] = jax.jit(transposed_product).lower(x, y).as_text()
    held = {name: "LayoutConstraint" in text for name, text in lowered.items()}
    assert held == {1: True, 2: False, "float32": False}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rotary_embedding_of_tpus_is_that_of_other_platforms(dtype):
    x = jnp.asarray(RNG.normal(size=(2, 5, 3, 8)), dtype)
    angles = jnp.asarray(RNG.normal(size=(2, 5, 1, 4)), jnp.float32)
    halves, product = (
        jax.jit(form)(x, jnp.cos(angles), jnp.sin(angles))
        for form in (_rotated_by_halves, _rotated_by_product)
    )
    assert product.dtype == halves.dtype == x.dtype
    np.testing.assert_allclose(
        *(np.float32(out) for out in (product, halves)), rtol=1e-2, atol=1e-6
    )


def test_gradient_of_the_rotary_embedding():
    x, weights = jnp.asarray(RNG.normal(size=(2, 2, 5, 3, 8)), jnp.float32)
    angles = jnp.asarray(RNG.normal(size=(2, 5, 4)), jnp.float32)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    total = lambda rotate, *angles: lambda x: jnp.sum(rotate(x, *angles) * weights)
    found = jax.grad(total(apply_rope, cos, sin))(x)
    expected = jax.grad(total(_rotated_by_halves, cos[:, :, None], sin[:, :, None]))(x)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
