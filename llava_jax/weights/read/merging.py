"""Tensors made of others when they are read: LoRA adapters, delta weights, grown vocabularies.

All is computed in float32, one tensor at a time.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from llava_jax.errors import LlavaError
from llava_jax.weights.checksums import verify_checksums
from llava_jax.weights.formats.pickle_files import open_pickle
from llava_jax.weights.formats.safetensors_files import StoredTensor, read_header
from llava_jax.weights.read.hf_fields import is_positive, read_json

ADAPTER_CONFIG = "adapter_config.json"
# Settings of PEFT under which the plain sum of weight and product would be wrong -> what is fine.
_PLAIN_LORA = {
    "peft_type": ("LORA",),
    "use_dora": (None, False),
    "fan_in_fan_out": (None, False),
    "lora_bias": (None, False),
    "bias": (None, "none"),  # PEFT trains others and leaves them out of what it saves
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    # The others (PiSSA, OLoRA, LoftQ, CorDA) change the base weights too.
    "init_lora_weights": (None, True, False, "gaussian", "eva"),
}


@dataclasses.dataclass(frozen=True)
class ComputedTensor(StoredTensor):
    """A tensor that no file holds; `path` and `offset` are those of the main one it is made of."""

    values: Callable[[], np.ndarray]

    def read(self) -> np.ndarray:
        return self.values()

    map = read


def computed(
    tensor: StoredTensor, values: Callable[[], np.ndarray], shape: tuple[int, ...] | None = None
) -> ComputedTensor:
    """A float32 tensor in place of another, of its shape or a new one."""
    return ComputedTensor(
        tensor.name, tensor.path, "F32", shape or tensor.shape, tensor.offset, values
    )


def _float32(tensor: StoredTensor) -> np.ndarray:
    return tensor.read().astype(np.float32)


def grow_rows(tensor: StoredTensor, rows: int, last: StoredTensor | None = None) -> StoredTensor:
    """A table [V, D] with `rows` rows: new ones are the mean of the old, as the original LLaVA
    begins them; `last`, where given, gives the last ones."""
    for table in (tensor, last or tensor):
        if len(table.shape) != 2 or table.shape[1] != tensor.shape[1]:
            raise LlavaError(
                f"tensor {table.name!r} in {table.path} has shape {list(table.shape)}: it must be "
                "a table with a row a token."
            )
    old, width = tensor.shape
    known = 0 if last is None else last.shape[0]
    if old > rows or known > rows:
        raise LlavaError(
            f"tensor {tensor.name!r} in {tensor.path} has {old} rows: more than the {rows} of "
            "config.json's vocab_size."
        )
    if old == rows and last is None:
        return tensor

    def values() -> np.ndarray:
        table = _float32(tensor)
        mean = np.broadcast_to(table.mean(axis=0), (rows - old, width))
        table = np.concatenate([table, mean])
        if last is not None:
            table[rows - known :] = _float32(last)
        return table

    return computed(tensor, values, (rows, width))


def add_delta(
    base: Mapping[str, StoredTensor], delta: Mapping[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """LLaVA v0's delta weights on the LLaMA they were taken from: the sum of both.

    A tensor with more rows than the base's (added tokens) keeps its own there; only the projector
    is absent from the base.

    Raises:
      LlavaError: the base is another model.
    """
    summed = {}
    for name, tensor in delta.items():
        if name not in base:
            if "mm_projector" not in name and "vision_tower" not in name:
                raise LlavaError(
                    f"{tensor.path} holds the delta of {name!r}, which the base does not have: "
                    "give the LLaMA that the delta was made for."
                )
            summed[name] = tensor
            continue
        grown = name.endswith(("embed_tokens.weight", "lm_head.weight"))
        rows = min(tensor.shape[:1], base[name].shape[:1]) if grown else tensor.shape[:1]
        if base[name].shape != (*rows, *tensor.shape[1:]):
            raise LlavaError(
                f"{name!r} is {list(tensor.shape)} in {tensor.path} and "
                f"{list(base[name].shape)} in {base[name].path}: the delta is of another base."
            )
        summed[name] = computed(tensor, _sum_of(base[name], tensor))
    missing = sorted(set(base) - set(delta))
    missing = [name for name in missing if "rotary_emb" not in name]
    if missing:
        raise LlavaError(f"the delta of {missing[0]!r} of {base[missing[0]].path} is missing.")
    return summed


def _sum_of(base: StoredTensor, delta: StoredTensor) -> Callable[[], np.ndarray]:
    def values() -> np.ndarray:
        total = _float32(delta)
        total[tuple(slice(size) for size in base.shape)] += _float32(base)
        return total

    return values


# --- LoRA -----------------------------------------------------------------------------------------


def open_adapter(folder: Path, allow_pickle: bool) -> dict[str, StoredTensor]:
    """The tensors of PEFT's `adapter_model` file, by the names of the model they are for."""
    verify_checksums(folder)
    safe, pickled = folder / "adapter_model.safetensors", folder / "adapter_model.bin"
    if safe.exists():
        tensors = {tensor.name: tensor for tensor in read_header(safe)}
    elif pickled.exists():
        tensors = open_pickle(pickled, allow_pickle)
    else:
        raise LlavaError(f"{folder} has {ADAPTER_CONFIG} but no {safe.name} and no {pickled.name}.")
    return {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}


def merge_lora(
    folder: Path, base: Mapping[str, StoredTensor], adapter: Mapping[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """The base with an adapter merged: W + alpha / r * B A; whole tensors replace the base's.

    Args:
      folder: of the adapter, with PEFT's `adapter_config.json`.
      base, adapter: tensors by the same names, the adapter's ending in `lora_A.weight` and
        `lora_B.weight`.
    Raises:
      LlavaError: a variant of LoRA that is not this sum, or an adapter that does not fit the base.
    """
    settings = _plain_settings(folder)
    merged = dict(base)
    for name, tensor in adapter.items():
        target, is_lora, kind = name.partition(".lora_")
        if not is_lora:
            if name not in base:
                raise _no_target(tensor, name)
            merged[name] = tensor
            continue
        if kind not in ("A.weight", "B.weight"):
            raise LlavaError(f"{tensor.path} holds {tensor.name!r}: only plain LoRA can be merged.")
        other = f"{target}.lora_{'B' if kind[0] == 'A' else 'A'}.weight"
        if other not in adapter:
            raise LlavaError(f"{tensor.path} holds {tensor.name!r} without its other half.")
        if kind == "A.weight":
            if f"{target}.weight" not in base:
                raise _no_target(tensor, f"{target}.weight")
            merged[f"{target}.weight"] = _with_lora(
                base[f"{target}.weight"],
                tensor,
                adapter[other],
                _scale(settings, folder, target, tensor),
            )
    return merged


def _plain_settings(folder: Path) -> dict:
    settings = read_json(folder / ADAPTER_CONFIG)
    for key, fine in _PLAIN_LORA.items():
        value = settings.get(key)
        if value not in fine:
            raise LlavaError(
                f"{folder / ADAPTER_CONFIG} has {key}={value!r}: only plain LoRA can be merged; "
                "merge it with PEFT first."
            )
    return settings


def _scale(settings: dict, folder: Path, target: str, down: StoredTensor) -> float:
    alpha, patterns = settings.get("lora_alpha"), settings.get("alpha_pattern") or {}
    try:
        for pattern, value in patterns.items():
            if re.fullmatch(rf"(.*\.)?({pattern})", target):
                alpha = value
                break
    except (AttributeError, re.error) as error:
        raise LlavaError(
            f"{folder / ADAPTER_CONFIG} has alpha_pattern={patterns!r}: it must map names to "
            "numbers."
        ) from error
    if not is_positive(alpha):
        raise LlavaError(
            f"{folder / ADAPTER_CONFIG} has lora_alpha={alpha!r}: it must be a number above 0."
        )
    rank = math.prod(down.shape[:1])
    if not rank:
        raise LlavaError(f"{down.name!r} in {down.path} has no rows: its rank must be above 0.")
    return alpha / (rank**0.5 if settings.get("use_rslora") else rank)


def _with_lora(
    weight: StoredTensor, down: StoredTensor, up: StoredTensor, scale: float
) -> StoredTensor:
    """weight [out, in] + scale * up [out, r] down [r, in]."""
    if (up.shape[:1] + down.shape[1:], up.shape[1:]) != (weight.shape, down.shape[:1]):
        raise LlavaError(
            f"{down.name!r} {list(down.shape)} and {up.name!r} {list(up.shape)} in {down.path} do "
            f"not fit {weight.name!r} {list(weight.shape)} in {weight.path}."
        )
    return computed(weight, lambda: _float32(weight) + scale * (_float32(up) @ _float32(down)))


def _no_target(tensor: StoredTensor, name: str) -> LlavaError:
    return LlavaError(
        f"{tensor.path} holds {tensor.name!r}, but the base has no {name!r}: give the base model "
        "that the adapter was trained on."
    )
