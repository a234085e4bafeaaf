"""Hand-written gradients against autodiff, and what bfloat16 products may and may not round."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax.models.decoder import swiglu
from llava_jax.models.linear import Linear, matmul, product_dtype

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(7, 12)), jnp.float32)
KERNEL = jnp.asarray(RNG.normal(size=(12, 5)), jnp.float32)
WEIGHTS = jnp.asarray(RNG.normal(size=(7, 5)), jnp.float32)  # of the sum that is differentiated


@jax.jit
def value_and_grads(x, kernel):
    def total(x, kernel):
        return jnp.sum(matmul(x, kernel).astype(jnp.float32) * WEIGHTS)

    return matmul(x, kernel), jax.grad(total, (0, 1))(x, kernel)


def test_gradients_of_matmul_are_those_of_autodiff():
    plain = jax.jit(jax.grad(lambda x, k: jnp.sum((x @ k) * WEIGHTS), (0, 1)))(X, KERNEL)
    y, grads = value_and_grads(X, KERNEL)
    np.testing.assert_allclose(y, X @ KERNEL, rtol=1e-6, atol=1e-6)
    for found, wanted in zip(grads, plain, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)


def test_a_float32_kernel_gets_its_gradient_unrounded_from_bfloat16_activations():
    x = X.astype(jnp.bfloat16)
    y, (dx, d_kernel) = value_and_grads(x, KERNEL)
    assert (y.dtype, dx.dtype, d_kernel.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    upstream = np.asarray(WEIGHTS.astype(jnp.bfloat16), np.float64)
    exact = np.asarray(x, np.float64).T @ upstream
    np.testing.assert_allclose(d_kernel, exact, rtol=1e-5, atol=1e-6)
    rounded = np.asarray(jnp.asarray(exact, jnp.bfloat16), np.float64)
    assert abs(d_kernel - rounded).max() > 1e-3


def test_products_sum_in_float32():
    """1 + 4095 halves of the last bfloat16 bit: summed in bfloat16 they would all be lost."""
    x = jnp.concatenate([jnp.ones(1), jnp.full(4095, 2.0**-9)])[None].astype(jnp.bfloat16)
    y = jax.jit(matmul)(x, jnp.ones((4096, 1), jnp.float32))
    assert float(y[0, 0]) == 9.0


def test_default_matmul_precision_rounds_operands_and_keeps_float32_arrays():
    exact = value_and_grads(X, KERNEL)
    with jax.default_matmul_precision("bfloat16"):
        assert product_dtype(jnp.float32) == jnp.bfloat16
        mixed = value_and_grads(X, KERNEL)
    assert product_dtype(jnp.float32) == jnp.float32
    for a, b in zip(jax.tree.leaves(mixed), jax.tree.leaves(exact), strict=True):
        assert a.dtype == jnp.float32
        assert 1e-5 < abs(a - b).max() < 0.02 * abs(b).max()
    by_hand = X.astype(jnp.bfloat16).astype(jnp.float32) @ KERNEL.astype(jnp.bfloat16).astype(
        jnp.float32
    )
    np.testing.assert_allclose(mixed[0], by_hand, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("use_bias", [True, False])
def test_linear_is_the_affine_map_over_any_leading_axes(use_bias):
    layer = Linear(5, ("embed", "mlp"), jnp.float32, use_bias)
    params = {"kernel": KERNEL} | ({"bias": jnp.arange(5.0)} if use_bias else {})
    x = X[:6].reshape(2, 3, 12)
    wanted = x @ KERNEL + (jnp.arange(5.0) if use_bias else 0)
    np.testing.assert_allclose(layer.apply({"params": params}, x), wanted, rtol=1e-6, atol=1e-5)


def test_gradients_of_swiglu_are_those_of_autodiff():
    gate, up, weights = jnp.asarray(RNG.normal(size=(3, 4, 9)) * 4, jnp.float32)

    def grads(function):
        return jax.grad(lambda g, u: jnp.sum(function(g, u) * weights), (0, 1))(gate, up)

    plain = jax.jit(lambda: grads(lambda gate, up: jax.nn.silu(gate) * up))()
    for found, wanted in zip(jax.jit(lambda: grads(swiglu))(), plain, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
