"""Kernels in fewer bytes: eight bits with one scale a channel, or the bits of bfloat16."""

import functools

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from llava_jax.models.precision import quantize

_quantize_columns = jax.jit(functools.partial(quantize, axis=-2))


def quantize_kernels(params: dict) -> dict:
    """Parameters with the language model's kernels as int8 [..., in, out] and scales [..., out].

    Embeddings, norms, biases, the vision encoder and the projector stay as they are: they are
    small, or lose more.
    """
    flat = dict(flatten_dict(params))
    for path in list(flat):
        if path[0] == "decoder" and path[-1] == "kernel":
            flat[path], flat[*path[:-1], "kernel_scale"] = _quantize_columns(flat[path])
    return unflatten_dict(flat)


def pack_kernels(params: dict) -> dict:
    """Parameters with the kernels of layers rounded to bfloat16; stacked kernels hold its bits.

    For products in bfloat16 on CPU, which round their operands anyway. XLA's CPU compiler copies a
    layer out of a stack of bfloat16 ten times slower than out of a stack of uint16.
    """
    flat = dict(flatten_dict(params))
    for path, leaf in flat.items():
        if "layers" in path and path[-1] == "kernel" and leaf.dtype != jnp.int8:
            rounded, stacked = leaf.astype(jnp.bfloat16), leaf.ndim == 3
            flat[path] = jax.lax.bitcast_convert_type(rounded, jnp.uint16) if stacked else rounded
    return unflatten_dict(flat)
