"""Reads PyTorch's files (`.bin`, `.pth`) without PyTorch and without running their code.

Such a file is a zip archive: `data.pkl` is a pickle that describes each tensor as a view of a
storage, and `data/KEY` holds the bytes of a storage, uncompressed. A pickle is a program that may
call anything; the reader here knows the few names that a table of tensors needs and refuses all
others. The result is the position of each tensor in the file, as for a safetensors file, so tensors
are read one at a time. Format: torch/serialization.py and torch/_utils.py of PyTorch.
"""

import collections
import dataclasses
import functools
import io
import math
import pickle
import zipfile
import zlib
from pathlib import Path

import numpy as np

from llava_jax.errors import LlavaError
from llava_jax.weights.tensors import StoredTensor

PICKLE_FILE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
MAX_PICKLE_BYTES = 100_000_000  # of data.pkl, which holds only the names of tensors
_CRC_PIECE = 1 << 20  # bytes read at once

# torch's storage class -> (dtype in the spelling of safetensors, bytes of an item)
_STORAGES = {
    "FloatStorage": ("F32", 4),
    "HalfStorage": ("F16", 2),
    "BFloat16Storage": ("BF16", 2),
    "DoubleStorage": ("F64", 8),
    "LongStorage": ("I64", 8),
    "IntStorage": ("I32", 4),
    "ShortStorage": ("I16", 2),
    "CharStorage": ("I8", 1),
    "ByteStorage": ("U8", 1),
    "BoolStorage": ("BOOL", 1),
    "ComplexFloatStorage": ("C64", 8),
    "ComplexDoubleStorage": ("C128", 16),
}
# Dtypes without a storage class, by their names in the pickle; no parameter has one of them.
_BARE_DTYPES = (
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
    *("uint16", "uint32", "uint64"),
)


def open_pickle(path: Path, allow_pickle: bool) -> dict[str, StoredTensor]:
    """The tensors, by name, of a PyTorch file that holds one flat dict of them.

    Raises:
      LlavaError: pickles are not allowed; the file asks for code, is damaged or holds no such dict.
    """
    if not allow_pickle:
        raise LlavaError(
            f"{path} is a pickle, which can run code: have its tensors read and nothing run with "
            "`llava-jax convert --allow_pickle` (in Python, allow_pickle=True)"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            return _tensors(path, archive)
    except LlavaError:
        raise
    except FileNotFoundError as error:
        raise LlavaError(f"{path} is missing") from error
    except zipfile.BadZipFile as error:
        raise LlavaError(
            f"{path} is truncated, or was written before PyTorch 1.6: load and save it again with "
            "PyTorch"
        ) from error
    except Exception as error:  # a damaged pickle raises anything
        raise LlavaError(f"{path} is damaged: {error!r}") from error


@dataclasses.dataclass
class _Storage:
    dtype: str
    item_bytes: int
    key: str
    items: int


@dataclasses.dataclass
class _View:
    """A tensor as the pickle describes it; not trusted until `_place` has checked it."""

    storage: _Storage
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class PickledTensor(StoredTensor):
    """A tensor of a PyTorch file: a view of a storage, whose bytes are checked before use.

    Attributes:
      axes: the axes of `shape` in the order of the file, the slowest first.
      storage: start of the whole storage in the file, and its number of bytes.
      crc: CRC-32 of the storage, from the archive.
    """

    axes: tuple[int, ...]
    storage: tuple[int, int]
    crc: int

    def _view(self, whole: bool) -> np.ndarray:
        if _crc32(self.path, *self.storage, self.path.stat().st_mtime_ns) != self.crc:
            raise LlavaError(
                f"{self.path} is damaged: the values of tensor {self.name!r} are not those that "
                "were written (its CRC-32 differs); get the file again"
            )
        shape = tuple(self.shape[axis] for axis in self.axes)
        in_file = StoredTensor(self.name, self.path, self.dtype, shape, self.offset)
        return in_file._view(whole).transpose(np.argsort(self.axes))


@functools.lru_cache(maxsize=1024)
def _crc32(path: Path, start: int, size: int, modified: int) -> int:
    """CRC-32 of a part of a file; `modified` makes the cache miss for a changed file."""
    crc = 0
    with open(path, "rb") as file:
        file.seek(start)
        for position in range(0, size, _CRC_PIECE):
            crc = zlib.crc32(file.read(min(_CRC_PIECE, size - position)), crc)
    return crc


# The unpickler in Python: a pickle can make the one in C allocate any amount of memory.
class _Reader(pickle._Unpickler):
    def __init__(self, path: Path, data: bytes):
        super().__init__(io.BytesIO(data))
        self.path = path
        self.known = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): lambda storage, start, shape, strides, *_: (
                _View(storage, start, shape, strides)
            ),
            ("torch._utils", "_rebuild_tensor_v3"): _bare_view,
            ("torch._utils", "_rebuild_parameter"): lambda view, *_: view,
            ("torch.storage", "UntypedStorage"): ("bytes", 1),
            **{("torch", name): name for name in _BARE_DTYPES},
            **{("torch", name): kind for name, kind in _STORAGES.items()},
        }

    def find_class(self, module: str, name: str):
        if (module, name) not in self.known:
            raise LlavaError(
                f"{self.path} asks for {module}.{name}, which a table of tensors does not need: "
                "save its tensors alone, best as safetensors"
            )
        return self.known[module, name]

    def persistent_load(self, pid: tuple) -> _Storage:
        _, (dtype, item_bytes), key, _, items = pid
        return _Storage(dtype, item_bytes, key, items)


def _bare_view(storage, start, shape, strides, _requires_grad, _hooks, dtype, *_) -> _View:
    if dtype not in _BARE_DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}")
    return _View(dataclasses.replace(storage, dtype=dtype), start, shape, strides)


def _tensors(path: Path, archive: zipfile.ZipFile) -> dict[str, StoredTensor]:
    members = {member.filename: member for member in archive.infolist()}
    description = [name for name in members if name.split("/", 1)[-1] == "data.pkl"]
    if len(description) != 1 or members[description[0]].file_size > MAX_PICKLE_BYTES:
        raise LlavaError(f"{path} is not a file of PyTorch tensors: it has no data.pkl of its own")
    root = description[0].removesuffix("data.pkl")
    if root + "byteorder" in members and archive.read(root + "byteorder") != b"little":
        raise LlavaError(f"{path} was written on a big-endian machine: save it again on another")
    views = _Reader(path, archive.read(description[0])).load()
    if not isinstance(views, dict):
        raise LlavaError(f"{path} holds a {type(views).__name__} and not a dict of tensors")
    with open(path, "rb") as file:
        return {name: _place(path, file, root, members, name, view) for name, view in views.items()}


def _place(path: Path, file, root: str, members: dict, name: str, view: _View) -> StoredTensor:
    """The position of a tensor in the file; everything that the pickle claims is checked."""
    if not isinstance(name, str) or not isinstance(view, _View):
        raise LlavaError(f"{path} holds {name!r}, which is no tensor: save the tensors alone")
    storage, shape, strides = view.storage, tuple(view.shape), tuple(view.strides)
    member = members[f"{root}data/{storage.key}"]
    items = math.prod(shape)
    sizes = (view.start, storage.items, *shape)
    if not all(type(size) is int and size >= 0 for size in sizes) or len(shape) != len(strides):
        raise LlavaError(f"{path} is damaged: the shape of tensor {name!r} makes no sense")
    if (
        member.compress_type != zipfile.ZIP_STORED
        or member.file_size != storage.items * storage.item_bytes
        or view.start + items > storage.items
    ):
        raise LlavaError(f"{path} is damaged: tensor {name!r} does not fit its storage")
    axes = tuple(sorted(range(len(shape)), key=lambda axis: -strides[axis]))
    ordered = [shape[axis] for axis in axes]
    dense = [math.prod(ordered[i + 1 :]) for i in range(len(axes))]
    if items and any(
        shape[axis] > 1 and strides[axis] != step for axis, step in zip(axes, dense, strict=True)
    ):
        raise LlavaError(f"tensor {name!r} in {path} is stored with gaps: save it .contiguous()")
    start = _data_start(file, member)
    offset = start + view.start * storage.item_bytes
    place = start, member.file_size
    return PickledTensor(name, path, storage.dtype, shape, offset, axes, place, member.CRC)


def _data_start(file, member: zipfile.ZipInfo) -> int:
    """Start of a member's bytes, after its local header (its lengths are not the directory's)."""
    file.seek(member.header_offset)
    header = file.read(30)
    if header[:4] != b"PK\x03\x04":
        raise LlavaError(f"{file.name} is damaged: {member.filename} is not where it should be")
    lengths = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
    return member.header_offset + 30 + sum(lengths)
