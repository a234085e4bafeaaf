"""Gathers of rows whose gradients are gathers too.

JAX differentiates a gather into a scatter, which TPUs do row after row. If no row is taken twice,
the gradient is a gather by the inverse.

B rows of a batch, T places in one, S places in what is taken from, K taps of a place, D size.
"""

import functools

import jax
import jax.numpy as jnp


def front_order(flags: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The stable order that moves flagged positions to the front, and its inverse.

        flags  0 1 0 1     order  1 3 0 2     rank  2 0 3 1

    Args:
      flags: bool[B, T].

    Returns:
      order, int32[B, T]: the positions, flagged ones first; rank, int32[B, T]: where each went.
    """
    length = flags.shape[1]
    before, after = jnp.cumsum(flags, axis=1), jnp.cumsum(~flags, axis=1)
    rank = jnp.where(flags, before, before[:, -1:] + after) - 1
    places = jnp.broadcast_to(jnp.arange(length), flags.shape)
    put = lambda rank, places: jnp.zeros_like(places).at[rank].set(places, unique_indices=True)
    return jax.vmap(put)(rank, places), rank


def take_rows(
    x: jax.Array, index: jax.Array, inverse: jax.Array | None = None, every: bool = False
) -> jax.Array:
    """x[..., index[..., t], :] for each t; a negative index takes any row, without a gradient.

        x  a b c d     index  -1 2 0     taken  ? c a     inverse  2 -1 1 -1

    Args:
      x: [..., S, D].
      index: int[..., T], no row twice if `inverse` is given.
      inverse: int[..., S], for each s the t that takes it, negative for none; with it the gradient
        is a gather too.
      every: whether each row of x is taken, so that `inverse` has no negative entry.

    Returns:
      [..., T, D].
    """
    return _gather(x, index) if inverse is None else _invertible(x, index, inverse, every)


def _gather(x: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x, index[..., None], axis=-2, mode="clip")


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _invertible(x: jax.Array, index: jax.Array, inverse: jax.Array, every: bool) -> jax.Array:
    return _gather(x, index)


def _forward(x, index, inverse, every):
    return _gather(x, index), inverse


def _backward(every, inverse, dy):
    dx = _gather(dy, inverse)
    return dx if every else jnp.where((inverse >= 0)[..., None], dx, 0), None, None


_invertible.defvjp(_forward, _backward)


def mix_rows(
    x: jax.Array, index: jax.Array, weights: jax.Array, inverse: jax.Array | None = None
) -> jax.Array:
    """The sum over k of weights[..., t, k] * x[..., index[..., t, k], :] for each t, in float32.

        x  a b c     index  0 1     weights  .5 .5     mixed  (a+b)/2     inverse  0 -1
                            2 -1              1  0            c                    1 -1
                                                                                   2 -1

    Args:
      x: [..., S, D].
      index: int[..., T, K]; a negative index has the weight 0.
      weights: float32[..., T, K], without a gradient.
      inverse: int[..., S, K], for each s the t * K + k that take it, negative for none; with it the
        gradient is such a sum too.

    Returns:
      [..., T, D].
    """
    if inverse is None:
        return _mixed(x, index, weights)
    return _invertible_mix(x, index, weights, inverse)


def _mixed(x: jax.Array, index: jax.Array, weights: jax.Array) -> jax.Array:
    total = 0.0
    for k in range(index.shape[-1]):
        taken = _gather(x, index[..., k]).astype(jnp.float32)
        total += weights[..., k, None] * taken
    return total.astype(x.dtype)


@jax.custom_vjp
def _invertible_mix(x, index, weights, inverse):
    return _mixed(x, index, weights)


def _forward_mix(x, index, weights, inverse):
    return _mixed(x, index, weights), (weights, inverse)


def _backward_mix(kept, dy):
    weights, inverse = kept
    taps = weights.shape[-1]
    flat = weights.reshape(*weights.shape[:-2], 1, -1)  # [..., 1, T * K]
    taken = jnp.take_along_axis(flat, jnp.maximum(inverse, 0), axis=-1, mode="clip")
    back = jnp.where(inverse >= 0, taken, 0)  # [..., S, K]
    return _mixed(dy, jnp.maximum(inverse, 0) // taps, back), None, None, None


_invertible_mix.defvjp(_forward_mix, _backward_mix)
