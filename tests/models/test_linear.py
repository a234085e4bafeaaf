"""Hand-written gradients against autodiff, and what bfloat16 products may and may not round."""

import jax
import jax.export
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


@pytest.mark.parametrize(("inputs", "outputs"), [((12,), (5,)), ((12,), (3, 4)), ((3, 4), (6,))])
def test_products_of_arrays_are_those_of_matrices(monkeypatch, inputs, outputs):
    """What TPUs and GPUs do, done here, against what CPUs do."""
    x = jnp.asarray(RNG.normal(size=(2, 7, *inputs)), jnp.float32)
    kernel = jnp.asarray(RNG.normal(size=(*inputs, *outputs)), jnp.float32)
    total = lambda x, k: jnp.sum(jnp.sin(matmul(x, k, len(inputs))))
    of_matrices = jax.value_and_grad(total, (0, 1))(x, kernel)
    taken = lambda *operands, cpu, default: default(*operands)
    monkeypatch.setattr(jax.lax, "platform_dependent", taken)
    of_arrays = jax.value_and_grad(total, (0, 1))(x, kernel)
    for found, wanted in zip(jax.tree.leaves(of_arrays), jax.tree.leaves(of_matrices), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_devices_add_up_gradients_in_the_kernel_s_dtype(platform):
    """What several devices have a part of crosses between them as the product gives it."""
    x, kernel = X.astype(jnp.bfloat16), KERNEL.astype(jnp.bfloat16)
    gradient = jax.jit(jax.grad(lambda k: jnp.sum(matmul(x, k).astype(jnp.float32) * WEIGHTS)))
    text = jax.export.export(gradient, platforms=[platform])(kernel).mlir_module()
    products = [line for line in text.splitlines() if "dot_general" in line and "->" in line]
    assert any("-> tensor<12x5xbf16>" in line for line in products), products


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


@pytest.mark.parametrize("inputs", [1, 2])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_heads_have_an_axis_of_their_own_and_the_same_numbers(inputs, dtype):
    """A kernel as an array, on either side, against the matrix that it is stored as."""
    shape = (12, 3, 4) if inputs == 1 else (3, 4, 12)
    kernel = jnp.asarray(RNG.normal(size=(12, 12)), jnp.float32)
    x = jnp.asarray(RNG.normal(size=(2, 5, *shape[:inputs])), dtype)
    weights = jnp.asarray(RNG.normal(size=(2, 5, 12)), jnp.float32)

    def total(x, kernel, as_matrix):
        if as_matrix:
            y = matmul(x.reshape(2, 5, -1), kernel)
        else:
            y = matmul(x, kernel.reshape(shape), inputs)
        return jnp.sum(y.reshape(2, 5, -1).astype(jnp.float32) * weights), y

    grads = jax.jit(jax.grad(total, (0, 1), has_aux=True), static_argnums=2)
    (found, y), (wanted, matrix) = (grads(x, kernel, as_matrix) for as_matrix in (False, True))
    assert y.shape == (2, 5, *shape[inputs:]) and y.dtype == dtype
    for a, b in zip((*found, y.reshape(matrix.shape)), (*wanted, matrix), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=1e-6)


def test_all_that_is_added_to_a_linear_layer_has_its_heads_too():
    """Bias, the scales of int8 and a low-rank update of one whose result has two axes."""
    draw = lambda *shape: jnp.asarray(RNG.normal(size=shape), jnp.float32)
    params = {"kernel": draw(12, 12), "bias": draw(12), "kernel_scale": draw(1, 12)}
    params |= {"lora_a": draw(12, 2), "lora_b": draw(2, 12)}
    x, axes = draw(2, 5, 12), ("embed", "heads")
    plain = Linear(12, axes, jnp.float32).apply({"params": params}, x)
    heads = Linear((3, 4), axes, jnp.float32).apply({"params": params}, x)
    np.testing.assert_allclose(heads, plain.reshape(2, 5, 3, 4), rtol=1e-6, atol=1e-6)
    out = Linear(12, axes, jnp.float32, inputs=2).apply({"params": params}, x.reshape(2, 5, 3, 4))
    np.testing.assert_allclose(out, plain, rtol=1e-6, atol=1e-6)


def test_gradients_of_swiglu_are_those_of_autodiff():
    gate, up, weights = jnp.asarray(RNG.normal(size=(3, 4, 9)) * 4, jnp.float32)

    def grads(function):
        return jax.grad(lambda g, u: jnp.sum(function(g, u) * weights), (0, 1))(gate, up)

    plain = jax.jit(lambda: grads(lambda gate, up: jax.nn.silu(gate) * up))()
    for found, wanted in zip(jax.jit(lambda: grads(swiglu))(), plain, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
