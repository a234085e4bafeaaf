import jax
import jax.numpy as jnp
import numpy as np

from llava_jax.models.gathering import front_order, take_rows

RNG = np.random.default_rng(0)


def test_flagged_places_come_first_in_their_turn():
    flags = np.array([[0, 1, 0, 1, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], bool)
    order, rank = front_order(flags)
    np.testing.assert_array_equal(order, [[1, 3, 4, 0, 2], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]])
    places = np.broadcast_to(np.arange(5), flags.shape)
    np.testing.assert_array_equal(np.take_along_axis(np.asarray(rank), order, axis=1), places)


def test_gradient_of_taken_rows_is_that_of_a_gather():
    x = RNG.normal(size=(2, 6, 3)).astype(np.float32)
    flags = RNG.random((2, 8)) < 0.5  # a flagged place takes one of the first rows, others none
    order, rank = front_order(flags)
    counts = np.sum(flags, axis=1, keepdims=True)
    assert np.all(counts < 6) and np.all(counts)
    index = jnp.where(flags, rank, 0)
    weights = np.where(flags[..., None], RNG.normal(size=(2, 8, 3)), 0)

    def total(take):
        return lambda x: jnp.sum(take(x) * weights)

    inverse = np.where(np.arange(6) < counts, order[:, :6], -1)
    ours = lambda x: take_rows(x, index, inverse)
    plain = lambda x: jnp.take_along_axis(x, index[..., None], axis=1)
    np.testing.assert_array_equal(ours(x), plain(x))
    np.testing.assert_allclose(*(jax.grad(total(f))(x) for f in (ours, plain)), rtol=1e-6)
