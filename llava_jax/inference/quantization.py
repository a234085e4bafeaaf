"""Kernels in fewer bytes: eight bits and a scale a channel, or the bits of bfloat16."""

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict


def quantize_kernels(params: dict) -> dict:
    """Parameters with the language model's kernels [..., in, out] as int8 beside their scales.

    Embeddings, norms, biases, the vision encoder and the projector stay as they are: they are few,
    or lose more.
    """
    flat = dict(flatten_dict(params))
    for path in list(flat):
        if path[0] == "decoder" and path[-1] == "kernel":
            flat[path], flat[*path[:-1], "kernel_scale"] = quantize_channels(flat[path])
    return unflatten_dict(flat)


@jax.jit
def quantize_channels(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[..., in, out] -> int8 [..., in, out] and the float32 scales [..., out] of the columns."""
    kernel = kernel.astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(kernel), axis=-2), 1e-30) / 127
    return jnp.round(kernel / scale[..., None, :]).astype(jnp.int8), scale


def pack_kernels(params: dict) -> dict:
    """Parameters with the kernels of layers rounded to bfloat16, those of stacked ones as its bits.

    For products in bfloat16 on CPU, which round them anyway: XLA's CPU compiler takes a layer out
    of a stack of bfloat16 number by number, ten times slower than out of one of uint16.
    """
    flat = dict(flatten_dict(params))
    for path, leaf in flat.items():
        if "layers" in path and path[-1] == "kernel" and leaf.dtype != jnp.int8:
            rounded, stacked = leaf.astype(jnp.bfloat16), leaf.ndim == 3
            flat[path] = jax.lax.bitcast_convert_type(rounded, jnp.uint16) if stacked else rounded
    return unflatten_dict(flat)
