"""The XLA attention's hand-written gradients, and transposes that are written out or left alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax.models.attention import attention
from llava_jax.models.precision import transposed

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
