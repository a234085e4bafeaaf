"""Kernels of four bits as GPTQ folders hold them; `weights/formats/packed.py` reads them."""

import numpy as np

from llava_jax.weights.formats.safetensors_files import TensorToWrite

MIDDLE = 8  # the unsigned integer that stands for 0
OUTPUTS = 8  # a kernel has a multiple of so many: zeros are packed by it


def gptq_values(group: int) -> dict:
    """The `quantization_config` of a folder with kernels of `packed_kernel`."""
    return {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": group,
        "desc_act": False,
        "sym": True,
        "checkpoint_format": "gptq",
    }


def packed_kernel(name: str, values: np.ndarray, scales: np.ndarray) -> list[TensorToWrite]:
    """The tensors of one kernel.

    Args:
      name: of the layer, without `.weight`.
      values: integers from -8 to 7, [in, out]; `in` is a multiple of 8, and `out` of OUTPUTS.
      scales: float16[groups, out].
    """
    group = len(values) // len(scales)
    zeros = np.full(scales.shape, MIDDLE - 1)  # the format stores them minus one
    arrays = {
        "qweight": _packed(values + MIDDLE, axis=0),
        "qzeros": _packed(zeros, axis=1),
        "scales": scales,
        "g_idx": np.arange(len(values), dtype=np.int32) // group,
    }
    return [
        TensorToWrite(f"{name}.{end}", array.shape, array.dtype, lambda array=array: array)
        for end, array in arrays.items()
    ]


def _packed(integers: np.ndarray, axis: int) -> np.ndarray:
    """Unsigned integers of four bits -> int32, eight neighbours in each, the first the lowest."""
    shape = [*integers.shape]
    shape[axis : axis + 1] = [-1, 8]
    shifts = np.arange(0, 32, 4, dtype=np.uint32).reshape((-1, 1) if axis == 0 else (-1,))
    parts = integers.astype(np.uint32).reshape(shape) << shifts
    return np.bitwise_or.reduce(parts, axis=axis + 1).view(np.int32)
