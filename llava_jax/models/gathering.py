"""Rows taken from their places, with gradients that are taken too.

JAX differentiates a gather into a scatter, which TPUs do row after row. Where no row is taken
twice, the gradient is a gather by the inverse.

B rows of a batch, T places in one, S places in what is taken from, D size.
"""

import jax
import jax.numpy as jnp


def front_order(flags: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The order that moves flagged places to the front, and its inverse; both keep turns.

    Args:
      flags: bool[B, T].

    Returns:
      order, int32[B, T]: the places, flagged ones first; rank, int32[B, T]: where each place went.
    """
    length = flags.shape[1]
    before, after = jnp.cumsum(flags, axis=1), jnp.cumsum(~flags, axis=1)
    rank = jnp.where(flags, before, before[:, -1:] + after) - 1
    places = jnp.broadcast_to(jnp.arange(length), flags.shape)
    put = lambda rank, places: jnp.zeros_like(places).at[rank].set(places, unique_indices=True)
    return jax.vmap(put)(rank, places), rank


@jax.custom_vjp
def take_rows(x: jax.Array, index: jax.Array, inverse: jax.Array, taken: jax.Array) -> jax.Array:
    """x[b, index[b, t]] for each t.

    Args:
      x: [B, S, D].
      index: int[B, T].
      inverse: int[B, S], for each s the one t that takes it whose gradient counts.
      taken: bool[B, S], whether there is one.

    Returns:
      [B, T, D].
    """
    return jnp.take_along_axis(x, index[..., None], axis=1, mode="clip")


def _backward(residuals, dy):
    inverse, taken = residuals
    dx = jnp.take_along_axis(dy, inverse[..., None], axis=1, mode="clip")
    return jnp.where(taken[..., None], dx, 0), None, None, None


take_rows.defvjp(
    lambda x, index, inverse, taken: (take_rows(x, index, inverse, taken), (inverse, taken)),
    _backward,
)
