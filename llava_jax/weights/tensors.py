"""A tensor of a checkpoint, and one of our parameters made of such: where it is, not its values.

Values are read one tensor at a time, or only the slices that a device holds.
"""

import contextlib
import dataclasses
import math
import mmap
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from tqdm import tqdm

from llava_jax.errors import LlavaError
from llava_jax.weights.name_tables import STACKED, Parameter

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
PARAMETER_DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file: its position, not its values."""

    name: str
    path: Path
    dtype: str  # as the file spells it: "F32", "BF16", ...
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file

    @property
    def place(self) -> str:
        """Its name in an error."""
        return f"tensor {self.name!r} in {self.path}"

    @property
    def value_dtype(self) -> np.dtype:
        """NumPy's form of `dtype`; LlavaError for one that no parameter has."""
        if self.dtype not in DTYPES:
            raise LlavaError(
                f"{self.place} is stored as {self.dtype}: only "
                f"{', '.join(DTYPES)} parameters can be read"
            )
        return DTYPES[self.dtype]

    def read(self) -> np.ndarray:
        """The values in the stored dtype: a view of the file, whose pages are read on access.

        It takes no memory of its own, and the system reads ahead in large pieces.
        """
        return self._view(whole=True)

    def map(self) -> np.ndarray:
        """Like `read`, for slices: little more than what is indexed is read."""
        return self._view(whole=False)

    def _view(self, whole: bool) -> np.ndarray:
        size = math.prod(self.shape) * self.value_dtype.itemsize
        if not size:
            return np.empty(self.shape, self.value_dtype)
        begin = self.offset % mmap.ALLOCATIONGRANULARITY
        with open(self.path, "rb") as file:
            if os.fstat(file.fileno()).st_size < self.offset + size:
                raise LlavaError(
                    f"{self.path} ends inside tensor {self.name!r}: get the file again"
                )
            view = mmap.mmap(
                file.fileno(), begin + size, access=mmap.ACCESS_READ, offset=self.offset - begin
            )
        if whole and hasattr(mmap, "MADV_HUGEPAGE"):  # of Linux
            with contextlib.suppress(OSError):  # a kernel without them
                view.madvise(mmap.MADV_HUGEPAGE)
        values = np.frombuffer(view, np.uint8, size, begin)
        return values.view(self.value_dtype).reshape(self.shape)


@dataclasses.dataclass(frozen=True)
class LazyParameter:
    """One of our parameters and the tensors it is made of.

    Attributes:
      parameter: its line of the name table.
      shape: ours; if stacked, with the blocks on axis 0.
      tensors: one for each block if stacked, else one.
    """

    parameter: Parameter
    shape: tuple[int, ...]
    tensors: tuple[StoredTensor, ...]

    @property
    def stacked(self) -> bool:
        return self.parameter.path.startswith(STACKED)

    def dtype(self, block: int = 0) -> np.dtype:
        """The stored dtype of one of `tensors`."""
        return self.tensors[block].value_dtype

    def place(self, block: int = 0) -> str:
        """Name and file of one of `tensors`, for errors."""
        return self.tensors[block].place

    def read(self, block: int = 0) -> np.ndarray:
        """The values of one of `tensors` in our layout and the stored dtype, without block axis."""
        return self._in_our_layout(self.tensors[block].read())

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        """The values at one slice an axis, in the stored dtype; nothing else is read."""
        if not self.stacked:
            return _copied(self._in_our_layout(self.tensors[0].map())[index])
        tensors = self.tensors[index[0]]
        return np.stack([_copied(self._in_our_layout(t.map())[index[1:]]) for t in tensors])

    def _in_our_layout(self, values: np.ndarray) -> np.ndarray:
        return from_stored(values, self.parameter, self.shape[1:] if self.stacked else self.shape)


def read_tree(params: Mapping[str, LazyParameter], dtype: str, name: str) -> dict:
    """Reads parameters by path into a nested dict of numpy arrays, in the order of the files.

    A progress bar called `name` counts bytes when it takes more than a moment.
    """
    check_dtype(dtype)
    tree: dict = {}
    reads = []
    for path, lazy in params.items():
        target = np.empty(lazy.shape, PARAMETER_DTYPES[dtype])
        _put(tree, path, target)
        targets = target if lazy.stacked else [target]
        reads += [(lazy, block, part) for block, part in enumerate(targets)]
    reads.sort(
        key=lambda read: (str(read[0].tensors[read[1]].path), read[0].tensors[read[1]].offset)
    )
    total = sum(stored_bytes(lazy.tensors) for lazy in params.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc=f"loading {name}", delay=2) as progress:
        for lazy, block, target in reads:
            values = lazy.read(block)
            with np.errstate(over="ignore"):  # reported below, with the name of the tensor
                _copy(values, target)
            if dtype == "float16":
                _check_overflow(lazy.tensors[block], values, target)
            progress.update(stored_bytes([lazy.tensors[block]]))
    return tree


def check_dtype(name: str) -> None:
    if name not in PARAMETER_DTYPES:
        raise LlavaError(f"unknown dtype {name!r}: choose {', '.join(PARAMETER_DTYPES)}")


def stored_bytes(tensors: Iterable[StoredTensor]) -> int:
    """Bytes that tensors take in their files."""
    item = lambda tensor: DTYPES[tensor.dtype].itemsize if tensor.dtype in DTYPES else 1
    return sum(int(np.prod(tensor.shape)) * item(tensor) for tensor in tensors)


def from_stored(values: np.ndarray, parameter: Parameter, shape: tuple[int, ...]) -> np.ndarray:
    """A Hugging Face tensor in our layout."""
    if parameter.transform == "transpose":
        return values.T
    if parameter.transform == "patches":  # [D, 3, p, p] -> [p * p * 3, D]
        return values.transpose(2, 3, 1, 0).reshape(shape)
    return values.reshape(shape)


def _copied(values: np.ndarray) -> np.ndarray:
    target = np.empty(values.shape, values.dtype)
    _copy(values, target)
    return target


def _copy(values: np.ndarray, target: np.ndarray) -> None:
    """target[...] = values; a transposed matrix in strips that fit the cache, six times as fast."""
    if values.ndim != 2 or values.flags.c_contiguous:
        target[...] = values
        return
    strip = 16  # rows as stored: 64 bytes of float32 of each row of the target
    for start in range(0, values.shape[1], strip):
        target[:, start : start + strip] = values[:, start : start + strip]


def _put(tree: dict, path: str, leaf: np.ndarray) -> None:
    *parents, name = path.split("/")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[name] = leaf


def _check_overflow(tensor: StoredTensor, values: np.ndarray, target: np.ndarray) -> None:
    if np.isinf(target).any() and not np.isinf(values).any():
        raise LlavaError(
            f"tensor {tensor.name!r} in {tensor.path} has values that float16 cannot hold: load it "
            "as bfloat16 or float32"
        )
