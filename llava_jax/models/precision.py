"""The number formats that a model computes in: of arrays, of products, of eight bits."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from llava_jax.errors import LlavaError

# name -> dtype of activations, `jax.default_matmul_precision` that goes with it
PRECISIONS = {
    "float32": ("float32", "highest"),  # also where matrix units would round to fewer bits
    "mixed": ("float32", "bfloat16"),  # float32 arrays, operands of products rounded to bfloat16
    "bfloat16": ("bfloat16", None),
}
DTYPES = ("auto", *PRECISIONS)


def check_dtype(name: str) -> str:
    """The name; LlavaError if it is none of DTYPES."""
    if name not in DTYPES:
        raise LlavaError(f"unknown dtype {name!r}: choose one of {', '.join(DTYPES)}")
    return name


def compute_precision(name: str, platform: str | None = None) -> tuple[jnp.dtype, str | None]:
    """Dtype of activations, and the `jax.default_matmul_precision` that goes with it.

    Args:
      name: a key of PRECISIONS, or `auto` for the fastest: bfloat16 on TPU and GPU, mixed on a CPU
        that multiplies bfloat16, float32 on other CPUs.
      platform: of the devices; None for JAX's default.
    """
    if name == "auto":
        on_cpu = (platform or jax.default_backend()) == "cpu"
        name = ("mixed" if cpu_multiplies_bfloat16() else "float32") if on_cpu else "bfloat16"
    dtype, precision = PRECISIONS[name]
    return jnp.dtype(dtype), precision


def cpu_multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for it (x86: AVX512_BF16 or AMX)."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def quantize(x, axis: int = -1, xp=jnp) -> tuple:
    """int8 values of the shape of x, and the float32 scales without `axis`: values * scales ~ x.

    Args:
      xp: numpy, for an array on the host, or jax.numpy.
    """
    x = x.astype(np.float32)
    scale = xp.maximum(xp.max(xp.abs(x), axis=axis), np.float32(1e-30)) / np.float32(127)
    return xp.rint(x / xp.expand_dims(scale, axis)).astype(np.int8), scale
