"""Quantized kernels out of folders: as they are stored, or rounded while they are read.

None is ever whole as floats. The arrays of a kernel are described in models/quantization.py.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType

import ml_dtypes
import numpy as np

from llava_jax.models.quantization import (
    copies_of_groups,
    dequantized,
    is_kernel,
    kernel_form,
    rounded,
)
from llava_jax.weights.formats.packed import PackedTensor
from llava_jax.weights.read.merging import computed
from llava_jax.weights.tensors import LazyParameter


@dataclasses.dataclass(frozen=True)
class RoundedPart:
    """The values or the scales of a kernel rounded to nearest, slice by slice.

    Attributes:
      kernel: floats [..., in, out]: a LazyParameter or an array.
      values: their dtype.
      group: inputs that share a scale.
      name: kernel or kernel_scale.
    """

    kernel: object
    values: np.dtype
    group: int
    name: str

    @property
    def dtype(self) -> np.dtype:
        scale = np.float32 if self.values == np.int8 else ml_dtypes.bfloat16
        return self.values if self.name == "kernel" else np.dtype(scale)

    @property
    def shape(self) -> tuple[int, ...]:
        *outer, inputs, outputs = self.kernel.shape
        rows = inputs if self.name == "kernel" else inputs // self.group
        return (*outer, rows, outputs)

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        *outer, rows, columns = index
        if not outer:
            return self._slice((), rows, columns)
        layers = range(self.shape[0])[outer[0]]  # one at a time: floats take eight times as much
        one = lambda layer: self._slice((slice(layer, layer + 1),), rows, columns)
        return np.concatenate([one(layer) for layer in layers])

    def _slice(self, outer: tuple[slice, ...], rows: slice, columns: slice) -> np.ndarray:
        begin, end, _ = rows.indices(self.shape[-2])
        size = self.group if self.name == "kernel_scale" else 1
        first = begin * size // self.group * self.group  # of whole groups
        last = -(-end * size // self.group) * self.group
        floats = np.asarray(self.kernel[(*outer, slice(first, last), columns)])
        values, scale = rounded(floats, self.values, self.group, np)
        return scale if self.name == "kernel_scale" else values[..., begin - first : end - first, :]


@dataclasses.dataclass(frozen=True)
class PackedPart:
    """One of the arrays of a kernel that its folder holds as integers, layer by layer.

    Attributes:
      kernel: of which each tensor is a PackedTensor.
      name: of the array.
    """

    kernel: LazyParameter
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        *outer, inputs, outputs = self.kernel.shape
        groups = self.kernel.tensors[0].groups
        of_layer = {"kernel": (inputs, outputs), "kernel_order": (inputs,)}
        return (*outer, *of_layer.get(self.name, (groups, outputs)))

    @property
    def dtype(self) -> np.dtype:
        bits = self.kernel.tensors[0].packing.bits
        kernel = np.dtype(ml_dtypes.int4 if bits == 4 else np.int8)
        others = {"kernel_scale": np.float32, "kernel_zero": np.int8, "kernel_order": np.int32}
        return np.dtype(others.get(self.name, kernel))

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        if not self.kernel.stacked:
            return self.kernel.tensors[0].part(self.name)[index]
        layers, *inner = index
        tensors = self.kernel.tensors[layers]
        return np.stack([tensor.part(self.name)[tuple(inner)] for tensor in tensors])


@dataclasses.dataclass(frozen=True)
class RepeatedPart:
    """The scales or zeros of groups that are cut into parts; see `quantization.cut_groups`.

    Attributes:
      part: those of whole groups.
      times: parts of each.
    """

    part: RoundedPart | PackedPart
    times: int

    @property
    def shape(self) -> tuple[int, ...]:
        *outer, groups, outputs = self.part.shape
        return (*outer, self.times * groups, outputs)

    @property
    def dtype(self) -> np.dtype:
        return self.part.dtype

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        *outer, rows, columns = index
        begin, end, _ = rows.indices(self.shape[-2])
        first, last = begin // self.times, -(-end // self.times)
        whole = np.repeat(self.part[(*outer, slice(first, last), columns)], self.times, axis=-2)
        skipped = begin - first * self.times
        return whole[..., skipped : skipped + end - begin, :]


KernelPart = RoundedPart | PackedPart | RepeatedPart


def packed_tensors(leaf: object) -> list[PackedTensor]:
    """The tensors of a parameter that its folder holds as packed integers."""
    tensors = leaf.tensors if isinstance(leaf, LazyParameter) else ()
    return [tensor for tensor in tensors if isinstance(tensor, PackedTensor)]


def quantized_parts(
    params: Mapping,
    form: str | None,
    head: bool = True,
    shards: Mapping[tuple[str, ...], int] = MappingProxyType({}),
) -> dict:
    """Parameters by path, with the arrays of quantized kernels in place of their floats.

    What a folder holds as integers stays as it is. A kernel of which it holds only some layers as
    integers is one of floats.

    Args:
      params: path -> LazyParameter or array.
      form, head: as in `quantize_kernels`; with None kernels of floats stay as they are.
      shards: as in `cut_groups`; none of a kernel that is not there.
    """
    parts = dict(params)
    for path, leaf in params.items():
        arrays = _arrays(path, leaf, form) if is_kernel(path, head) else {}
        for name, part in arrays.items():
            if name in ("kernel_scale", "kernel_zero"):
                times = copies_of_groups(part.shape[-2], shards.get(path, 1))
                part = part if times == 1 else RepeatedPart(part, times)
            parts[*path[:-1], name] = part
    return parts


def _arrays(path: tuple[str, ...], leaf, form: str | None) -> dict[str, KernelPart]:
    """The arrays of a kernel that is quantized, or is to be; none for other kernels."""
    packed = packed_tensors(leaf)
    if packed and len(packed) == len(leaf.tensors):
        names = ["kernel", "kernel_scale"]
        names += ["kernel_zero"] if any(tensor.has_zeros for tensor in packed) else []
        names += ["kernel_order"] if any(tensor.order is not None for tensor in packed) else []
        return {name: PackedPart(leaf, name) for name in names}
    if form is None:
        return {}
    dtype, group = kernel_form(path, leaf.shape[-2], form)
    return {name: RoundedPart(leaf, dtype, group, name) for name in ("kernel", "kernel_scale")}


def round_kernels(params: Mapping, form: str) -> dict:
    """Parameters by path; the layers' kernels have the values that quantizing leaves them.

    Args:
      params: path -> LazyParameter or array.
    """

    def of_layer(kernel: np.ndarray, path: tuple[str, ...]) -> np.ndarray:  # [in, out]
        dtype, group = kernel_form(path, kernel.shape[0], form)
        values, scale = rounded(kernel, dtype, group, np)
        return dequantized({"kernel": values, "kernel_scale": scale}, np)

    def rounds(path: tuple[str, ...], leaf):
        if not is_kernel(path, head=False):
            return leaf
        if not isinstance(leaf, LazyParameter):
            return np.stack([of_layer(kernel, path) for kernel in np.asarray(leaf)])
        stored = lambda tensor: of_layer(tensor.read().T, path).T
        lazy = tuple(computed(tensor, partial(stored, tensor)) for tensor in leaf.tensors)
        return dataclasses.replace(leaf, tensors=lazy)

    return {path: rounds(path, leaf) for path, leaf in params.items()}


def packing_notes(folder: Path, params: dict[str, LazyParameter]) -> Iterator[str]:
    """What a folder says of the precision of its kernels, if they are packed integers."""
    kernels = {path: packed_tensors(leaf) for path, leaf in params.items()}
    kinds = {str(tensor.packing) for tensors in kernels.values() for tensor in tensors}
    if kinds:
        yield (
            f"{folder} is quantized ({', '.join(sorted(kinds))}): a model that answers keeps the "
            "language model's kernels so, training and conversion read them as float32"
        )
    for path, tensors in kernels.items():
        if tensors and (len(tensors) < len(params[path].tensors) or path[:8] != "decoder/"):
            yield f"{path} of {folder} is kept in floats: only a part of it is quantized"
