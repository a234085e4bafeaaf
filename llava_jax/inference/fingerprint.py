"""A short name for the values of a model's parameters, independent of their devices and form."""

import hashlib

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from llava_jax.models.precision import compute_precision


def weights_fingerprint(params: dict, dtype: str = "float32") -> str:
    """16 hex digits that change if any value used in the computation does.

    Equal on one device and on a mesh, for stacked and separate layers, and, if `dtype` multiplies
    in bfloat16, for kernels that are rounded beforehand or not. Computed on the devices of the
    parameters.
    """
    rounded = "bfloat16" in (compute_precision(dtype)[0].name, compute_precision(dtype)[1])
    flat = flatten_dict(params)
    digests = jax.device_get(
        jax.jit(lambda flat: {path: _digest(path, flat[path], rounded) for path in flat})(flat)
    )
    lines = []
    for path, digest in digests.items():
        shape = flat[path].shape[digest.ndim :]
        if not digest.ndim:
            lines.append((path, shape, int(digest)))
            continue
        at = path.index("layers") + 1
        for layer, one in enumerate(digest.tolist()):
            lines.append(((*path[:at], str(layer), *path[at:]), shape, one))
    return hashlib.sha256(repr(sorted(lines)).encode()).hexdigest()[:16]


def _digest(path: tuple[str, ...], leaf: jax.Array, rounded: bool) -> jax.Array:
    """uint32[], or uint32[L] for stacked layers: the sum of the bits of an array's values."""
    if rounded and "layers" in path and path[-1] == "kernel" and leaf.dtype == jnp.float32:
        leaf = leaf.astype(jnp.bfloat16)
    stacked = "layers" in path and not path[path.index("layers") + 1].isdecimal()
    return jax.vmap(_sum_of_bits)(leaf) if stacked else _sum_of_bits(leaf)


def _sum_of_bits(leaf: jax.Array) -> jax.Array:
    """uint32[]: the sum of bit patterns weighted by position; exact, so the order is free."""
    if leaf.dtype == jnp.int4:
        leaf = leaf.astype(jnp.int8)
    bits = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * leaf.dtype.itemsize}"))
    bits = bits.astype(jnp.uint32)
    place = jnp.ones(leaf.shape, jnp.uint32)
    for axis in range(leaf.ndim):
        steps = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
        place = place * jnp.uint32(2654435761) + steps
    return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)
