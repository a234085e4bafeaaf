"""The chunked loss against the plain one, and what is not computed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llava_jax.parallel.mesh import make_mesh
from llava_jax.training.losses import IGNORE_INDEX, cross_entropy_sum, next_token_targets
from tests.jaxprs import equations

B, T, D, V = 3, 10, 8, 23
RNG = np.random.default_rng(0)
HIDDEN = jnp.asarray(RNG.normal(size=(B, T, D)), jnp.float32)
TABLE = jnp.asarray(RNG.normal(size=(V, D)), jnp.float32)


ONES = jnp.ones(B)


def targets(*counts: int) -> np.ndarray:
    """[rows, T] with so many supervised positions in each row, at random places."""
    result = np.full((len(counts), T), IGNORE_INDEX)
    for row, count in enumerate(counts):
        places = RNG.permutation(T)[:count]
        result[row, places] = RNG.integers(0, V, count)
    return result


def plain_sum(hidden, table, targets):
    """float64 reference on the host's terms: all logits at once."""
    logits = hidden @ table.T
    log_p = jax.nn.log_softmax(logits)
    picked = jnp.take_along_axis(log_p, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    return -jnp.sum(jnp.where(targets == IGNORE_INDEX, 0.0, picked))


@functools.partial(jax.jit, static_argnames="chunk")
def chunked(hidden, table, targets, chunk):
    return jax.value_and_grad(cross_entropy_sum, (0, 1))(hidden, table, targets, ONES, chunk)


@pytest.mark.parametrize("chunk", [1, 3, 10, 64])
def test_any_chunk_gives_the_full_loss_and_its_gradients(chunk):
    for counts in ((10, 10, 10), (7, 1, 4), (0, 0, 9), (0, 0, 1)):
        wanted = targets(*counts)
        total, grads = chunked(HIDDEN, TABLE, wanted, chunk)
        plain, plain_grads = jax.value_and_grad(plain_sum, (0, 1))(HIDDEN, TABLE, wanted)
        np.testing.assert_allclose(total, plain, rtol=1e-5)
        for found, reference in zip(grads, plain_grads, strict=True):
            np.testing.assert_allclose(found, reference, rtol=1e-4, atol=1e-5)
        assert not np.asarray(grads[0])[wanted == IGNORE_INDEX].any()


def test_nothing_supervised_is_zero_with_gradients_of_zero():
    total, grads = chunked(HIDDEN, TABLE, targets(0, 0, 0), 3)
    assert total == 0
    assert not any(np.asarray(g).any() for g in grads)


def test_each_row_has_its_weight():
    wanted, weights = targets(7, 0, 4), jnp.array([0.5, 3.0, 2.0])
    weighted = jax.value_and_grad(cross_entropy_sum, (0, 1))
    total, grads = jax.jit(weighted, static_argnums=4)(HIDDEN, TABLE, wanted, weights, 3)
    rows = [np.where(np.arange(B)[:, None] == row, wanted, IGNORE_INDEX) for row in range(B)]
    alone = [chunked(HIDDEN, TABLE, row, 3) for row in rows]
    np.testing.assert_allclose(total, sum(w * t for w, (t, _) in zip(weights, alone, strict=True)))
    for i in range(2):
        expected = sum(w * g[i] for w, (_, g) in zip(weights, alone, strict=True))
        np.testing.assert_allclose(grads[i], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("axes", [{"data": 2, "fsdp": 4}, {"fsdp": 8}, {"fsdp": 4, "tensor": 2}])
@pytest.mark.parametrize("width", [8, 12])
def test_rows_on_several_devices_give_what_they_give_on_one(axes, width):
    """Weighted rows of unequal length, one of them empty; a width of 12 is not split by 8."""
    mesh = make_mesh(**{"data": 1, **axes})
    hidden = jnp.asarray(RNG.normal(size=(8, T, width)), jnp.float32)
    table = jnp.asarray(RNG.normal(size=(V, width)), jnp.float32)
    weights = jnp.asarray(RNG.uniform(0.5, 2, 8), jnp.float32)
    wanted = targets(7, 0, 4, 10, 1, 2, 9, 3)
    run = jax.jit(jax.value_and_grad(cross_entropy_sum, (0, 1)), static_argnums=4)
    total, grads = run(hidden, table, wanted, weights, 3)
    rows, columns = (NamedSharding(mesh, spec) for spec in (P(("data", "fsdp")), P(None, "fsdp")))
    columns = columns if width % mesh.shape["fsdp"] == 0 else NamedSharding(mesh, P())
    with jax.set_mesh(mesh):
        spread = [jax.device_put(array, rows) for array in (hidden, wanted, weights)]
        placed = jax.device_put(table, columns)
        total_spread, grads_spread = run(spread[0], placed, *spread[1:], 3)
    np.testing.assert_allclose(total_spread, total, rtol=1e-5)
    for found, alone in zip(grads_spread, grads, strict=True):
        np.testing.assert_allclose(found, alone, rtol=1e-4, atol=1e-5)


def test_large_logits_stay_finite():
    total, grads = chunked(HIDDEN * 1e4, TABLE, targets(3, 3, 3), 3)
    assert np.isfinite(total) and all(np.isfinite(g).all() for g in grads)


def test_gradients_scale_with_what_comes_from_above():
    wanted = targets(5, 5, 2)
    scaled = jax.grad(lambda h, t: 3.0 * cross_entropy_sum(h, t, wanted, ONES, 4), (0, 1))
    _, grads = chunked(HIDDEN, TABLE, wanted, 4)
    for found, one in zip(jax.jit(scaled)(HIDDEN, TABLE), grads, strict=True):
        np.testing.assert_allclose(found, 3 * one, rtol=1e-5, atol=1e-6)


def traced(wanted, chunk):
    """The jaxpr of the loss with gradients of the arguments in `wanted` (none: loss alone)."""
    function = functools.partial(cross_entropy_sum, chunk=chunk)
    if wanted:
        function = jax.grad(function, wanted)
    return jax.make_jaxpr(function)(HIDDEN, TABLE, targets(4, 4, 4), ONES)


def test_a_frozen_output_projection_gets_no_gradient_and_none_is_computed():
    products = {wanted: len(equations(traced(wanted, 2), "dot_general")) for wanted in WANTED}
    assert products == {(): 1, (0,): 2, (1,): 2, (0, 1): 3}
    shapes = {
        wanted: [e.outvars[0].aval.shape for e in equations(traced(wanted, 2), "dot_general")]
        for wanted in WANTED
    }
    assert (V, D) not in shapes[(0,)] and (V, D) in shapes[(0, 1)]


WANTED = ((), (0,), (1,), (0, 1))


@pytest.mark.parametrize("wanted", WANTED)
def test_logits_exist_for_one_chunk_at_a_time(wanted):
    text = str(traced(wanted, 2))
    assert f"[{B},2,{V}]" in text
    assert f"[{B},{T},{V}]" not in text and f"[{B * T},{V}]" not in text


def test_bfloat16_hidden_states_against_float32_masters():
    wanted = targets(8, 2, 5)
    hidden = HIDDEN.astype(jnp.bfloat16)
    total, (d_hidden, d_table) = chunked(hidden, TABLE, wanted, 4)
    plain, (_, plain_table) = chunked(hidden.astype(jnp.float32), TABLE, wanted, 4)
    assert (d_hidden.dtype, d_table.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(total, plain, rtol=0.01)
    np.testing.assert_allclose(d_table, plain_table, atol=0.02 * float(abs(plain_table).max()))


def test_targets_are_the_next_labels_of_the_same_conversation():
    ignored = IGNORE_INDEX
    labels = np.array([[ignored, 5, 6, ignored, 7, 8, ignored]])
    segments = np.array([[1, 1, 1, 2, 2, 2, 0]])
    found = next_token_targets(labels, segments)
    np.testing.assert_array_equal(found, [[5, 6, ignored, 7, 8, ignored, ignored]])
    # A first token that carries a label (v0 does that) is nobody's target.
    labels = np.array([[5, 6, 7, 8, 9]])
    found = next_token_targets(labels, np.array([[1, 1, 2, 2, 3]]))
    np.testing.assert_array_equal(found, [[6, ignored, 8, ignored, ignored]])
    found = next_token_targets(labels, np.zeros((1, 5), int))
    np.testing.assert_array_equal(found, np.full((1, 5), ignored))
