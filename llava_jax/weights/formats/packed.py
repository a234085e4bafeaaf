"""Packed kernels of quantized checkpoints: AWQ (form gemm) and GPTQ.

In place of `X.weight` [out, in] such a folder holds, for groups of inputs,

    X.qweight   int32, several unsigned integers in each      AWQ [in, out/8], GPTQ [in/n, out]
    X.qzeros    int32, the integers that stand for 0          [groups, out/n]
    X.scales    [groups, out]
    X.g_idx     int32 [in], GPTQ alone: the group of each input, in any order with desc_act

with n integers of 4 or 8 bits in an int32, the lowest bits first: of GPTQ n neighbours, of AWQ the
outputs 0, 2, 4, 6, 1, 3, 5, 7 of eight. A weight is (integer - zero) * scale. The first version of
GPTQ stores zeros minus one. Formulas: `dequantize_gemm` of AutoAWQ (awq/utils/packing_utils.py),
`dequantize_weight` of GPTQModel (nn_modules/qlinear).
"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from llava_jax.errors import LlavaError
from llava_jax.models.quantization import PARTS, dequantized
from llava_jax.weights.formats.safetensors_files import parse_json
from llava_jax.weights.tensors import StoredTensor

PACKING_KEY = "quantization_config"  # of config.json
PACKING_FILES = ("quant_config.json", "quantize_config.json")  # the same of AutoAWQ, of AutoGPTQ
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_UNQUANTIZED = "give the folder of the model before it was quantized"


@dataclasses.dataclass(frozen=True)
class Packing:
    """How the kernels of a folder are packed.

    Attributes:
      method: awq or gptq.
      bits: of an integer.
      group_size: inputs that share a scale; -1 for all.
      zeros_less_one: whether stored zeros are one less than they are.
    """

    method: str
    bits: int
    group_size: int
    zeros_less_one: bool = False

    def __str__(self) -> str:
        groups = f"groups of {self.group_size}" if self.group_size > 0 else "one group a column"
        return f"{self.method}, {self.bits} bits in {groups}"


def read_packing(values: object, source: str) -> Packing:
    """The packing that a `quantization_config` describes.

    Raises:
      LlavaError: a method or a variant that cannot be read.
    """
    refused = lambda what, why: LlavaError(
        f"{source} has a quantization_config with {what}, of which {why}: {_UNQUANTIZED}"
    )
    values = values if isinstance(values, dict) else {}
    method = str(values.get("quant_method")).lower()
    if method not in ("awq", "gptq"):
        raise refused(f"quant_method={method!r}", "only awq and gptq can be read")
    bits, group_size = values.get("bits", 4), values.get("group_size", 128)
    key = "version" if method == "awq" else "checkpoint_format"
    form = str(values.get(key) or values.get("format") or {"awq": "gemm"}.get(method, method))
    forms = ("gemm",) if method == "awq" else ("gptq", "gptq_v2")
    if form.lower() not in forms or values.get("is_marlin_format"):
        form = "marlin" if values.get("is_marlin_format") else form
        raise refused(f"the form {form!r} of {method}", f"only {' and '.join(forms)} can be read")
    if type(bits) is not int or bits not in ((4,) if method == "awq" else (4, 8)):
        raise refused(f"bits={bits!r}", f"only {'4' if method == 'awq' else '4 and 8'} can be read")
    if type(group_size) is not int or group_size < 1 and group_size != -1:
        raise refused(f"group_size={group_size!r}", "only a number of inputs, or -1, can be read")
    return Packing(method, bits, group_size, form.lower() == "gptq")


@dataclasses.dataclass(frozen=True)
class PackedTensor(StoredTensor):
    """A kernel [out, in] that is read as float32, or as the integers that it is: see `part`.

    `path` and `offset` are those of `qweight`.
    """

    packing: Packing
    qweight: StoredTensor
    qzeros: StoredTensor
    scales: StoredTensor
    g_idx: StoredTensor | None

    @property
    def groups(self) -> int:
        return self.scales.shape[0]

    @functools.cached_property
    def order(self) -> np.ndarray | None:
        """int32[in]: the inputs sorted by their groups; None if they are in order already."""
        if self.g_idx is None:
            return None
        groups = _integers(self.g_idx)
        size = self.shape[1] // self.groups
        order = np.argsort(groups, kind="stable").astype(np.int32)
        if not np.array_equal(groups[order], np.repeat(np.arange(self.groups), size)):
            raise LlavaError(f"{self.g_idx.place} does not name each group {size} times")
        return None if np.array_equal(order, np.arange(len(order))) else order

    @functools.cached_property
    def has_zeros(self) -> bool:
        """Whether any integer but the middle one stands for 0: none does in symmetric forms."""
        return bool(self.part("kernel_zero").any())

    def part(self, name: str) -> np.ndarray:
        """One of the arrays of the kernel [in, out], as models/quantization.py describes them."""
        packing = self.packing
        middle = 2 ** (packing.bits - 1)  # integers with a sign: the same differences
        if name == "kernel":
            axis = 1 if packing.method == "awq" else 0
            values = _unpacked(_integers(self.qweight), packing, axis)
            values = values if self.order is None else values[self.order]
            dtype = ml_dtypes.int4 if packing.bits == 4 else np.int8
            return (values - middle).astype(np.int8).astype(dtype)
        if name == "kernel_scale":
            return self.scales.read().astype(np.float32)
        if name == "kernel_zero":
            zeros = _unpacked(_integers(self.qzeros), packing, 1)
            zeros = (zeros + packing.zeros_less_one) & (2**packing.bits - 1)
            return (zeros - middle).astype(np.int8)
        order = np.arange(self.shape[1], dtype=np.int32) if self.order is None else self.order
        return order  # kernel_order

    def read(self) -> np.ndarray:
        names = ("kernel", *PARTS[: 2 if self.order is None else 3])
        return np.ascontiguousarray(dequantized({n: self.part(n) for n in names}, np).T)

    map = read


def _integers(tensor: StoredTensor) -> np.ndarray:
    """The values of an int32 tensor, which no parameter of a model is."""
    return dataclasses.replace(tensor, dtype="F32").read().view(np.int32)


def _unpacked(packed: np.ndarray, packing: Packing, axis: int) -> np.ndarray:
    """int32 [a, b] -> the unsigned integers in it, int16, with `axis` several times as long."""
    bits = packing.bits
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    if packing.method == "awq":
        shifts = shifts[np.argsort(_AWQ_ORDER)]
    shifts = shifts.reshape((-1, 1) if axis == 0 else (-1,))
    spread = np.expand_dims(packed.view(np.uint32), axis + 1) >> shifts
    size = [*packed.shape]
    size[axis] = -1
    return (spread & (2**bits - 1)).astype(np.int16).reshape(size)


def unpacked(folder: Path, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors of a folder, with `X.weight` in place of the packed tensors of X.

    Raises:
      LlavaError: config.json does not say how they are packed, or their shapes do not agree.
    """
    layers = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    if not layers:
        return dict(tensors)
    source = folder / "config.json"
    config = parse_json(source, source.read_bytes()) if source.is_file() else {}
    text = config.get("text_config")
    inner = text.get(PACKING_KEY) if isinstance(text, dict) else None
    values = config.get(PACKING_KEY) or inner
    if not values:
        raise LlavaError(
            f"{folder} holds {layers[0]}.qweight, but its config.json has no quantization_config "
            f"that says how it is packed: add that, or {_UNQUANTIZED}"
        )
    packing = read_packing(values, str(source))
    found = dict(tensors)
    for layer in layers:
        parts = {end: found.pop(f"{layer}.{end}", None) for end in ("qweight", "qzeros", "scales")}
        g_idx = found.pop(f"{layer}.g_idx", None)
        if missing := [end for end, tensor in parts.items() if tensor is None]:
            raise LlavaError(f"{folder} holds {layer}.qweight and no {layer}.{missing[0]}")
        if f"{layer}.weight" in found:
            raise LlavaError(f"{folder} holds both {layer}.qweight and {layer}.weight")
        found[f"{layer}.weight"] = _kernel(f"{layer}.weight", packing, g_idx=g_idx, **parts)
    return found


def _kernel(
    name: str,
    packing: Packing,
    qweight: StoredTensor,
    qzeros: StoredTensor,
    scales: StoredTensor,
    g_idx: StoredTensor | None,
) -> PackedTensor:
    """One kernel, its shapes checked."""
    several = 32 // packing.bits
    for tensor in (qweight, qzeros, scales):
        if len(tensor.shape) != 2:
            raise LlavaError(f"{tensor.place} has the shape {list(tensor.shape)}: not a matrix")
    rows, columns = qweight.shape
    inputs, outputs = (
        (rows, columns * several) if packing.method == "awq" else (rows * several, columns)
    )
    group = packing.group_size if packing.group_size > 0 else inputs
    if inputs % group:
        raise LlavaError(
            f"{qweight.place} has {inputs} inputs, which are no multiple of group_size={group}"
        )
    wanted = {
        qweight: ("I32", qweight.shape),
        qzeros: ("I32", (inputs // group, outputs // several)),
        scales: (scales.dtype, (inputs // group, outputs)),
    }
    if g_idx is not None:
        wanted[g_idx] = "I32", (inputs,)
    for tensor, (dtype, shape) in wanted.items():
        if (tensor.dtype, tensor.shape) != (dtype, shape):
            raise LlavaError(
                f"{tensor.place} is {tensor.dtype} {list(tensor.shape)} and not {dtype} "
                f"{list(shape)}, as {packing} would have it"
            )
    _ = scales.value_dtype  # raises LlavaError for one that no parameter has
    return PackedTensor(
        name, qweight.path, "F32", (outputs, inputs), qweight.offset,
        packing, qweight, qzeros, scales, g_idx,
    )  # fmt: skip
