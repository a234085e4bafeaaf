"""A short name for the values of a model's parameters, the same on any number of devices."""

import hashlib

import jax
import jax.numpy as jnp


def weights_fingerprint(params: dict) -> str:
    """16 hex digits that change when any parameter does; computed where the parameters live."""
    leaves = jax.tree.leaves_with_path(params)
    digests = jax.device_get(
        jax.jit(lambda values: [_digest(v) for v in values])([leaf for _, leaf in leaves])
    )
    lines = [
        f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype} {digest}"
        for (path, leaf), digest in zip(leaves, digests, strict=True)
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _digest(leaf: jax.Array) -> jax.Array:
    """uint32[]: the sum of the bit patterns, weighted by place; whole numbers, so order is free."""
    bits = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * leaf.dtype.itemsize}"))
    bits = bits.astype(jnp.uint32)
    place = jnp.ones(leaf.shape, jnp.uint32)
    for axis in range(leaf.ndim):
        steps = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
        place = place * jnp.uint32(2654435761) + steps
    return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)
