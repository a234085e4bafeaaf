"""Folders in Hugging Face's layout, written whole or not at all."""

import contextlib
import dataclasses
import errno
import os
import shutil
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from llava_jax.errors import LlavaError
from llava_jax.files import locked, write_json
from llava_jax.models.decoder import DecoderConfig
from llava_jax.models.vit import ViTConfig
from llava_jax.weights.checksums import write_checksums
from llava_jax.weights.families import (
    decoder_to_hf,
    encoder_to_hf,
    family_of,
)
from llava_jax.weights.formats.safetensors_files import SINGLE_FILE, TensorToWrite, write_file
from llava_jax.weights.name_tables import (
    STACKED,
    NameTable,
    Parameter,
)
from llava_jax.weights.tensors import PARAMETER_DTYPES, LazyParameter, StoredTensor


@contextlib.contextmanager
def whole_folder(out: Path, digests: Mapping[str, str] | None = None) -> Iterator[Path]:
    """Gives a temporary folder that becomes `out` only if the block succeeds.

    Checksums of all its files are added last, so an interrupted write leaves nothing that looks
    complete. A folder that exists at `out` is replaced in the same step; a link is followed.

    Args:
      digests: SHA-256 of files that were hashed while they were written; read when the block ends.
    Raises:
      LlavaError: another process is writing `out`, the disk is full, or writing is not permitted.
    """
    out = Path(out).resolve()  # links resolved, since `partial` must be its sibling
    partial = out.with_name(f".{out.name}.partial")
    try:
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LlavaError(f"{out} cannot be written: {error.strerror}") from error
    with _claimed(partial, out):
        try:
            yield partial
            write_checksums(partial, digests or {})
            _replace(partial, out)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise LlavaError(f"the disk of {out} is full: nothing was written there") from None
            raise


@contextlib.contextmanager
def _claimed(partial: Path, out: Path) -> Iterator[None]:
    """Locks the folder `partial` and removes what a killed process left in it.

    The lock ends with the process, however that ends.
    """
    busy = f"another process is writing {out}: wait for it, or choose another folder"
    with contextlib.ExitStack() as stack:
        try:
            descriptor = stack.enter_context(locked(partial, busy))
            ours = os.path.samestat(os.fstat(descriptor), os.stat(partial))
        except (FileNotFoundError, NotADirectoryError):  # it finished since we looked
            ours = False
        if not ours:
            raise LlavaError(busy)
        for left in partial.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        yield


def _replace(partial: Path, out: Path) -> None:
    old = partial.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        os.rename(out, old)
    os.rename(partial, out)
    shutil.rmtree(old, ignore_errors=True)


def write_checkpoint(folder: Path, config: dict, tensors: Iterable[TensorToWrite]) -> None:
    """Writes `config.json` and `model.safetensors` into an existing folder."""
    write_file(folder / SINGLE_FILE, tensors)
    write_json(folder / "config.json", config)


def save_decoder(
    folder: str | Path, config: DecoderConfig, params: dict, dtype: str = "float32"
) -> None:
    """Writes decoder parameters in the form of transformers' Llama, Mistral or Qwen classes."""
    refuse_existing(folder)
    values = decoder_to_hf(config) | {"dtype": dtype, "torch_dtype": dtype}
    names = family_of("decoder", values).names
    tensors = stored_tensors(names, config, array_params(params), dtype)
    with whole_folder(Path(folder)) as temporary:
        write_checkpoint(temporary, values, tensors)


def save_vision(
    folder: str | Path, config: ViTConfig, params: dict, dtype: str = "float32"
) -> None:
    """Writes encoder parameters, with as many blocks as `params` has and without a final norm."""
    refuse_existing(folder)
    config = dataclasses.replace(config, num_layers=len(params["layers"]["layer_norm1"]["scale"]))
    values = encoder_to_hf(config) | {"dtype": dtype, "torch_dtype": dtype}
    table = dataclasses.replace(family_of("vision", values).names, idle=())
    tensors = stored_tensors(table, config, array_params(params), dtype)
    with whole_folder(Path(folder)) as temporary:
        write_checkpoint(temporary, values, tensors)


def refuse_existing(folder: str | Path) -> None:
    """Raises LlavaError if the path exists and is not an empty folder."""
    path = Path(folder)
    if os.path.lexists(path) and not (path.is_dir() and not any(path.iterdir())):
        raise LlavaError(f"{folder} exists already: choose another folder or remove it")


@dataclasses.dataclass(frozen=True)
class ArrayParameter:
    """A parameter in memory, with the methods of LazyParameter that `stored_tensors` calls."""

    values: np.ndarray | jax.Array
    stacked: bool

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def dtype(self, block: int = 0) -> np.dtype:
        return np.dtype(self.values.dtype)

    def place(self, block: int = 0) -> None:
        """None: no file holds it."""

    def read(self, block: int = 0) -> np.ndarray:
        return np.asarray(self.values[block] if self.stacked else self.values)


def array_params(tree: dict) -> dict[str, ArrayParameter | LazyParameter]:
    """A component's tree of arrays or LazyParameters in the form that `stored_tensors` takes."""
    return {
        path: leaf
        if isinstance(leaf, LazyParameter)
        else ArrayParameter(leaf, path.startswith(STACKED))
        for path, leaf in flatten_dict(tree, sep="/").items()
    }


def stored_tensors(
    table: NameTable,
    config: object,
    params: Mapping[str, ArrayParameter | LazyParameter],
    dtype: str | None = None,
    idle: Mapping[str, StoredTensor] = types.MappingProxyType({}),
) -> list[TensorToWrite]:
    """A component's parameters under the first of their Hugging Face names.

    Args:
      params: by our path in the component.
      dtype: of the tensors; None keeps each one's own.
      idle: tensors that the model never computes with, from `match.idle_tensors`. If transformers
        requires one that is not there, it gets ones for a scale and zeros otherwise, so that a
        block passes its input through.
    """
    sizes = table.sizes(config)
    kept = next(iter(params.values())).dtype() if params else np.dtype(np.float32)
    target = PARAMETER_DTYPES[dtype] if dtype else None
    tensors, idle = [], dict(idle)
    for parameter in (*table.parameters, *table.idle):
        if not parameter.used_by(config):
            continue
        shape = tuple(sizes[letter] for letter in parameter.stored_shape.split())
        source = params.get(parameter.path)
        stacked = parameter.path.startswith(STACKED)
        held = 0 if source is None else source.shape[0] if stacked else 1
        for layer in range(config.num_layers if stacked else 1):
            key = parameter.keys[0].format(layer=layer)
            if layer < held:
                read = partial(_read, source, layer, parameter, shape)
                where = source.place(layer) or f"tensor {key!r}"
                tensors.append(_to_write(key, shape, target, source.dtype(layer), read, where))
            elif key in idle:
                tensors.append(_idle_to_write(key, idle.pop(key), target))
            else:
                fill = np.ones if parameter.path.endswith("scale") else np.zeros
                tensors.append(TensorToWrite(key, shape, target or kept, partial(fill, shape)))
    tensors += [_idle_to_write(key, tensor, target) for key, tensor in idle.items()]
    return tensors


def _idle_to_write(key: str, tensor: StoredTensor, target: np.dtype | None) -> TensorToWrite:
    return _to_write(key, tensor.shape, target, tensor.value_dtype, tensor.read, tensor.place)


def _read(source, block: int, parameter: Parameter, shape: tuple[int, ...]) -> np.ndarray:
    return to_stored(source.read(block), parameter, shape)


def _to_write(
    key: str,
    shape: tuple[int, ...],
    target: np.dtype | None,
    stored: np.dtype,
    read: Callable[[], np.ndarray],
    place: str,
) -> TensorToWrite:
    """`place` names the tensor in an error."""
    if target is None or target == stored:
        return TensorToWrite(key, shape, stored, read)

    def cast() -> np.ndarray:
        values = read()
        with np.errstate(over="ignore"):  # reported below, with the name of the tensor
            changed = values.astype(target)
        if target == np.float16 and np.isinf(changed).any() and not np.isinf(values).any():
            raise LlavaError(
                f"{place} has values that float16 cannot hold: choose bfloat16 or float32"
            )
        return changed

    return TensorToWrite(key, shape, target, cast)


def to_stored(values: np.ndarray, parameter: Parameter, shape: tuple[int, ...]) -> np.ndarray:
    """One of our parameters in Hugging Face's layout; the inverse of `tensors.from_stored`."""
    if parameter.transform == "transpose":
        return values.T
    if parameter.transform == "patches":  # [p * p * 3, D] -> [D, 3, p, p]
        hidden, channels, side, _ = shape
        return values.reshape(side, side, channels, hidden).transpose(3, 2, 0, 1)
    return values.reshape(shape)
