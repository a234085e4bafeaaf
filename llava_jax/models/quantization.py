"""Kernels in fewer bytes: integers with scales, or the bits of bfloat16.

A quantized kernel is several arrays of one linear layer:

    kernel        int8 or int4 [..., in, out]
    kernel_scale  float [..., groups, out]: a group is in / groups inputs that follow each other
    kernel_zero   int8 [..., groups, out]: the integer that stands for 0; absent where all are 0
    kernel_order  int32 [..., in]: the input that each row is for; absent where they are in order

and the weight of row i is (kernel[i] - kernel_zero[g]) * kernel_scale[g], g being its group. A
kernel [4, 2] in two groups:

    kernel   [[ 1, -3], [ 2, 5],    [[ 1, 7], [-8, 0]]
    scale     [[.1, .5],             [.2, 1]]
    zero      [[0, 1],               [0, 2]]
    weights  [[.1, -2], [.2, 2],    [.2, 5], [-1.6, -2]]

L layers.
"""

import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from llava_jax.errors import LlavaError
from llava_jax.models.precision import quantize

FORMS = ("int8", "int4")  # in which the kernels of a language model can be kept
GROUP = 32  # inputs that share a scale in int4
PARTS = ("kernel_scale", "kernel_zero", "kernel_order")  # what stands next to a quantized kernel


def check_form(form: str | None, name: str) -> str | None:
    """The form; LlavaError, which calls it `name`, if it is neither None nor one of FORMS."""
    if form not in (None, *FORMS):
        raise LlavaError(f"{name} must be {' or '.join(FORMS)} or None, not {form!r}")
    return form


def kernel_form(path: tuple[str, ...], inputs: int, form: str) -> tuple[np.dtype, int]:
    """(dtype, inputs of a group) of a kernel of the language model.

    In int4, two kinds of kernels are kept in int8: those whose inputs are no multiple of GROUP, and
    the output projection, in which few bits cost most.
    """
    if form == "int4" and path[-2] != "lm_head" and inputs % GROUP == 0:
        return np.dtype(ml_dtypes.int4), GROUP
    return np.dtype(np.int8), inputs


def rounded(x, dtype: np.dtype, group: int, xp=jnp) -> tuple:
    """(values, scale) of a kernel [..., in, out] rounded to nearest.

    In eight bits the largest number of a group, by size, becomes 127 or -127. In four bits it
    becomes -8, which may make the scale negative: 16 integers are used, not 15. Those scales are
    rounded to bfloat16 before the numbers are divided by them.

    Args:
      xp: numpy, for an array on the host, or jax.numpy.
    """
    *outer, inputs, outputs = x.shape
    x = x.astype(np.float32).reshape(*outer, inputs // group, group, outputs)
    if dtype == np.int8:
        values, scale = quantize(x, -2, xp)
    else:
        scale = four_bit_scale(x, ml_dtypes.bfloat16, xp)
        values = xp.rint(x / scale.astype(np.float32)[..., None, :])
        values = xp.clip(values, -8, 7).astype(np.int8).astype(dtype)
    return values.reshape(*outer, inputs, outputs), scale


def four_bit_scale(x, dtype, xp=jnp):
    """The scales [..., out] of groups [..., group, out]; see `rounded`."""
    low, high = xp.min(x, axis=-2), xp.max(x, axis=-2)
    scale = (xp.where(-low > high, low, high) / np.float32(-8)).astype(dtype)
    return xp.where(scale == 0, xp.ones_like(scale), scale)


def dequantized(kernel: dict, xp=jnp):
    """The weights [..., in, out] of a quantized kernel in float32, rows in the order of inputs."""
    values, scale = kernel["kernel"], kernel["kernel_scale"].astype(np.float32)
    *outer, inputs, outputs = values.shape
    groups = scale.shape[-2]
    values = values.astype(np.float32).reshape(*outer, groups, inputs // groups, outputs)
    if "kernel_zero" in kernel:
        values = values - kernel["kernel_zero"].astype(np.float32)[..., None, :]
    weights = (values * scale[..., None, :]).reshape(*outer, inputs, outputs)
    if "kernel_order" not in kernel:
        return weights
    places = xp.argsort(kernel["kernel_order"], axis=-1)
    return xp.take_along_axis(weights, places[..., None], axis=-2)


def quantize_kernels(params: dict, form: str, head: bool = True) -> dict:
    """Parameters with the language model's kernels quantized, those that are floats.

    Embeddings, norms, biases, the vision encoder and the projector stay as they are: they are
    small, or lose more.

    Args:
      form: one of FORMS; see `kernel_form`.
      head: the output projection too.
    """
    flat = dict(flatten_dict(params))
    for path, leaf in list(flat.items()):
        if is_kernel(path, head) and jnp.issubdtype(leaf.dtype, jnp.floating):
            dtype, group = kernel_form(path, leaf.shape[-2], form)
            flat[path], flat[*path[:-1], "kernel_scale"] = _rounded(leaf, dtype, group)
    return unflatten_dict(flat)


_rounded = jax.jit(rounded, static_argnums=(1, 2))


def is_kernel(path: tuple[str, ...], head: bool = True) -> bool:
    """Whether a parameter is a kernel of the language model; with `head` or without its output."""
    return path[0] == "decoder" and path[-1] == "kernel" and (head or path[-2] != "lm_head")


def cut_groups(params: dict, shards: dict[tuple[str, ...], int]) -> dict:
    """Parameters of which no group is on two devices: each part of a cut one has its own scale.

    The weights stay the same.

    Args:
      shards: path of a kernel -> parts that its inputs are cut into.
    """
    flat = dict(flatten_dict(params))
    for path, leaf in flat.items():
        if path[-1] in ("kernel_scale", "kernel_zero"):
            times = copies_of_groups(leaf.shape[-2], shards[*path[:-1], "kernel"])
            flat[path] = leaf if times == 1 else jnp.repeat(leaf, times, axis=-2)
    return unflatten_dict(flat)


def copies_of_groups(groups: int, shards: int) -> int:
    """How many parts a group must be cut into for `shards` devices to hold whole parts.

    86 groups of 128 inputs on 8 devices: 4, which makes 43 groups of 32 inputs on each. A single
    group is on all devices.
    """
    return 1 if groups == 1 else shards // math.gcd(groups, shards)


def stored_bytes(shape: tuple[int, ...], dtype) -> int:
    """Bytes of an array on a device, where int4 takes half a byte."""
    bits = 4 if dtype == jnp.int4 else 8 * np.dtype(dtype).itemsize
    return math.prod(shape) * bits // 8


def pack_kernels(params: dict) -> dict:
    """Parameters with the kernels of layers rounded to bfloat16; stacked kernels hold its bits.

    For products in bfloat16 on CPU, which round their operands anyway. XLA's CPU compiler copies a
    layer out of a stack of bfloat16 ten times slower than out of a stack of uint16.
    """
    flat = dict(flatten_dict(params))
    for path, leaf in flat.items():
        if "layers" in path and path[-1] == "kernel" and jnp.issubdtype(leaf.dtype, jnp.floating):
            packed, stacked = leaf.astype(jnp.bfloat16), leaf.ndim == 3
            flat[path] = jax.lax.bitcast_convert_type(packed, jnp.uint16) if stacked else packed
    return unflatten_dict(flat)
