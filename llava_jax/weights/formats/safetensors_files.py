"""safetensors files, read and written one tensor at a time.

The headers are parsed here rather than by the `safetensors` package so that an error can name the
file and the tensor, and so that no more than two tensors are ever in memory.
Format: https://github.com/huggingface/safetensors#format
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np

from llava_jax.errors import LlavaError
from llava_jax.weights.tensors import DTYPES, StoredTensor

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors package
SHARD_BYTES = 5_000_000_000  # of transformers 4

# Bits of an item. All but `DTYPES` are legal in a file and never a parameter: they are refused only
# when one must be read, as is a dtype of a later version, whose size is not known here.
_ITEM_BITS = {
    "F4": 4,
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}


def read_header(path: Path) -> list[StoredTensor]:
    """The tensors of one safetensors file, every size and offset checked against the file."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if size < 8 or header_bytes > min(size - 8, MAX_HEADER_BYTES):
                raise LlavaError(
                    f"{path} is truncated or not a safetensors file: its header of {header_bytes} "
                    f"bytes does not fit in its {size} bytes"
                )
            text = file.read(header_bytes)
    except OSError as error:
        raise LlavaError(f"{path} cannot be read: {error.strerror}") from error
    header = parse_json(path, text)
    header.pop("__metadata__", None)
    start = 8 + header_bytes
    tensors, spans = [], []
    for name, entry in header.items():
        begin, end = _check_entry(path, name, entry)
        if start + end > size:
            raise LlavaError(
                f"{path} is truncated: tensor {name!r} ends at byte {start + end} and the file "
                f"has {size}; get the file again"
            )
        tensors.append(
            StoredTensor(name, path, entry["dtype"], tuple(entry["shape"]), start + begin)
        )
        spans.append((begin, end))
    _check_spans(path, sorted(spans), size - start)
    return tensors


def parse_json(path: Path, text: bytes) -> dict:
    def unique(pairs: list[tuple[str, object]]) -> dict:
        entries = dict(pairs)
        if len(entries) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(n for n in names if names.count(n) > 1)
            raise LlavaError(f"{path} names {twice!r} twice: a checkpoint holds each tensor once")
        return entries

    try:
        parsed = json.loads(text, object_pairs_hook=unique)
    except LlavaError:
        raise
    except (ValueError, RecursionError) as error:
        raise LlavaError(f"{path} is damaged: its header is not JSON ({error})") from error
    if not isinstance(parsed, dict):
        raise LlavaError(f"{path} is damaged: its header is not a JSON object")
    return parsed


def _check_entry(path: Path, name: str, entry: object) -> tuple[int, int]:
    def is_size(value: object) -> bool:
        return type(value) is int and value >= 0

    fault = f"{path} is damaged: the header entry of tensor {name!r} makes no sense."
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= set(entry):
        raise LlavaError(fault)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or not isinstance(shape, list) or not isinstance(offsets, list):
        raise LlavaError(fault)
    if not all(map(is_size, shape)) or len(offsets) != 2 or not all(map(is_size, offsets)):
        raise LlavaError(fault)
    size, bits = offsets[1] - offsets[0], _ITEM_BITS.get(dtype)
    if size < 0 or (bits is not None and 8 * size != math.prod(shape) * bits):
        raise LlavaError(
            f"{path} is damaged: tensor {name!r} of shape {shape} and dtype {dtype} does not fill "
            f"its bytes {offsets[0]} to {offsets[1]}"
        )
    return offsets[0], offsets[1]


def _check_spans(path: Path, spans: list[tuple[int, int]], data_bytes: int) -> None:
    position = 0
    for begin, end in spans:
        if begin != position:
            raise LlavaError(f"{path} is damaged: its tensors overlap or leave a hole at {begin}")
        position = end
    if position != data_bytes:
        raise LlavaError(
            f"{path} is damaged: it holds {data_bytes} bytes of data and its header {position}"
        )


@dataclass(frozen=True)
class TensorToWrite:
    """A tensor whose values are made only when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    values: Callable[[], np.ndarray]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def write_checkpoint_files(
    folder: Path,
    tensors: Iterable[TensorToWrite],
    progress: Callable[[int], object] = lambda count: None,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, str]:
    """Writes `model.safetensors`, or shards and their index if that file would be too large.

    Args:
      progress: called with the number of bytes of each tensor written.
    Returns:
      The SHA-256 of each file with tensors, by its name.
    """
    shards = _shards(tensors, shard_bytes)
    names = [SINGLE_FILE]
    if len(shards) > 1:
        names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in _from_1(shards)]
        index = {t.name: name for name, shard in zip(names, shards, strict=True) for t in shard}
        total = sum(tensor.bytes for shard in shards for tensor in shard)
        values = {"metadata": {"total_size": total}, "weight_map": index}
        (folder / INDEX_FILE).write_text(json.dumps(values, indent=2) + "\n")
    return {
        name: write_file(folder / name, shard, progress)
        for name, shard in zip(names, shards, strict=True)
    }


def _shards(tensors: Iterable[TensorToWrite], limit: int) -> list[list[TensorToWrite]]:
    """Tensors in order; a shard ends before it would exceed `limit` bytes."""
    shards, filled = [[]], 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.bytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.bytes
    return shards


def _from_1(items: list) -> range:
    return range(1, len(items) + 1)


def write_file(
    path: Path,
    tensors: Iterable[TensorToWrite],
    progress: Callable[[int], object] = lambda count: None,
) -> str:
    """Writes one safetensors file; returns its SHA-256.

    The next tensor is made and hashed while one is written; no more are in memory.
    """
    tensors = list(tensors)
    header = _header(tensors)
    digest = hashlib.sha256(header)

    def hashed(tensor: TensorToWrite) -> memoryview:
        data = _bytes_of(tensor)
        digest.update(data)
        return data

    with open(path, "wb", buffering=0) as file, ThreadPoolExecutor(1) as pool:
        _write_all(file, header)
        ahead = pool.submit(hashed, tensors[0]) if tensors else None
        for tensor, following in zip_longest(tensors, tensors[1:]):
            data = ahead.result()
            ahead = following and pool.submit(hashed, following)
            _write_all(file, data)
            progress(tensor.bytes)
    return digest.hexdigest()


def _header(tensors: list[TensorToWrite]) -> bytes:
    """The bytes before the values."""
    spelling = {dtype: name for name, dtype in DTYPES.items()} | {np.dtype(np.int32): "I32"}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    position = 0
    for tensor in tensors:
        end = position + tensor.bytes
        header[tensor.name] = {
            "dtype": spelling[np.dtype(tensor.dtype)],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # keeps the data 8-byte aligned
    return len(text).to_bytes(8, "little") + text


def _bytes_of(tensor: TensorToWrite) -> memoryview:
    values = np.asarray(tensor.values(), dtype=tensor.dtype, order="C")
    if values.shape != tensor.shape:
        raise ValueError(f"{tensor.name}: made {values.shape}, announced {tensor.shape}")
    return values.reshape(-1).view(np.uint8).data


def _write_all(file, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
