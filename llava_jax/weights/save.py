"""Folders in Hugging Face's layout, written whole or not at all."""

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from llava_jax.errors import LlavaError
from llava_jax.models.decoder import DecoderConfig
from llava_jax.models.vit import ViTConfig
from llava_jax.weights import hf_config
from llava_jax.weights.checksums import write_checksums
from llava_jax.weights.lazy import PARAMETER_DTYPES
from llava_jax.weights.name_tables import (
    DECODERS,
    STACKED,
    VISION_ENCODERS,
    NameTable,
    Parameter,
)
from llava_jax.weights.safetensors_files import SINGLE_FILE, TensorToWrite, write_file


@contextlib.contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Gives a temporary folder that becomes `out` only if the block ends well.

    Checksums of all its files are added last, so an interrupted write leaves nothing that looks
    complete; a folder already at `out` is replaced in the same step.
    """
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    try:
        yield temporary
        write_checksums(temporary)
        temporary.chmod(0o777 & ~_umask())  # mkdtemp makes folders private
        old = temporary.with_name(temporary.name + ".old")
        if out.exists():
            os.rename(out, old)
        try:
            os.rename(temporary, out)
        except OSError as error:
            raise LlavaError(
                f"{out} appeared while it was being written: another run writes there too."
            ) from error
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_checkpoint(folder: Path, config: dict, tensors: Iterable[TensorToWrite]) -> None:
    """Writes `config.json` and `model.safetensors` into an existing folder."""
    write_file(folder / SINGLE_FILE, tensors)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def save_decoder(
    folder: str | Path, config: DecoderConfig, params: dict, dtype: str = "float32"
) -> None:
    """Writes decoder parameters as transformers' Llama, Mistral or Qwen classes read them."""
    _refuse_existing(folder)
    values = hf_config.decoder_to_hf(config) | {"dtype": dtype, "torch_dtype": dtype}
    tensors = _tensors(DECODERS[values["model_type"]], config, params, dtype)
    with whole_folder(Path(folder)) as temporary:
        write_checkpoint(temporary, values, tensors)


def save_vision(
    folder: str | Path, config: ViTConfig, params: dict, dtype: str = "float32"
) -> None:
    """Writes encoder parameters, with as many blocks as `params` has; they hold no final norm."""
    _refuse_existing(folder)
    config = dataclasses.replace(config, num_layers=len(params["layers"]["layer_norm1"]["scale"]))
    values = hf_config.vision_to_hf(config) | {"dtype": dtype, "torch_dtype": dtype}
    tensors = _tensors(VISION_ENCODERS[values["model_type"]], config, params, dtype)
    with whole_folder(Path(folder)) as temporary:
        write_checkpoint(temporary, values, tensors)


def _refuse_existing(folder: str | Path) -> None:
    if Path(folder).exists():
        raise LlavaError(f"{folder} exists already: choose another folder or remove it.")


def _tensors(table: NameTable, config: object, params: dict, dtype: str) -> list[TensorToWrite]:
    sizes = table.sizes(config)
    tensors = []
    for parameter in table.parameters:
        if not parameter.used_by(config):
            continue
        leaf = params
        for name in parameter.path.split("/"):
            leaf = leaf[name]
        shape = tuple(sizes[letter] for letter in parameter.stored_shape.split())
        if not parameter.path.startswith(STACKED):
            tensors.append(_tensor(parameter.keys[0], parameter, shape, dtype, leaf))
            continue
        for layer, block in enumerate(leaf):
            key = parameter.keys[0].format(layer=layer)
            tensors.append(_tensor(key, parameter, shape, dtype, block))
    return tensors


def _tensor(
    key: str, parameter: Parameter, shape: tuple[int, ...], dtype: str, leaf
) -> TensorToWrite:
    target = PARAMETER_DTYPES[dtype]
    return TensorToWrite(
        key, shape, target, lambda: to_stored(np.asarray(leaf), parameter, shape).astype(target)
    )


def to_stored(values: np.ndarray, parameter: Parameter, shape: tuple[int, ...]) -> np.ndarray:
    """One of our parameters in Hugging Face's layout; the inverse of `lazy.from_stored`."""
    if parameter.transform == "transpose":
        return values.T
    if parameter.transform == "patches":  # [p * p * 3, D] -> [D, 3, p, p]
        hidden, channels, side, _ = shape
        return values.reshape(side, side, channels, hidden).transpose(3, 2, 0, 1)
    return values.reshape(shape)
