"""The XLA attention's hand-written gradients, rotary embeddings, and transposes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax.models import attention as module
from llava_jax.models.attention import attention, cached_attention
from llava_jax.models.decoder import _rotated_by_halves, _rotated_by_product, apply_rope
from llava_jax.models.linear import transposed

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


def test_rows_in_blocks_of_keys_are_whole_rows(monkeypatch):
    """A causal row, one that begins late, one in a window, and one whose queries see one key."""
    monkeypatch.setattr(module, "LONG_ROW", 4)
    monkeypatch.setattr(module, "KEYS_AT_A_TIME", 4)
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
    found = cached_attention(q, k, v, jnp.asarray(mask))
    expected = attention(q, jnp.nan_to_num(k), v, jnp.asarray(mask))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert " while[" in str(jax.make_jaxpr(cached_attention)(q, k, v, mask))


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
