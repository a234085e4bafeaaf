"""LoRA adapters as PEFT saves them, merged into the tensors of their base as those are read."""

import math
import re
from collections.abc import Mapping
from pathlib import Path

from llava_jax.errors import LlavaError
from llava_jax.weights.checksums import verify_checksums
from llava_jax.weights.formats.pickle_files import open_pickle
from llava_jax.weights.formats.safetensors_files import StoredTensor, read_header
from llava_jax.weights.read.fields import is_positive, read_json
from llava_jax.weights.read.merging import computed, float32

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


def open_adapter(folder: Path, allow_pickle: bool) -> dict[str, StoredTensor]:
    """The tensors of PEFT's `adapter_model` file, by the names of the model they are for."""
    verify_checksums(folder)
    safe, pickled = folder / "adapter_model.safetensors", folder / "adapter_model.bin"
    if safe.exists():
        tensors = {tensor.name: tensor for tensor in read_header(safe)}
    elif pickled.exists():
        tensors = open_pickle(pickled, allow_pickle)
    else:
        raise LlavaError(f"{folder} has {ADAPTER_CONFIG} but no {safe.name} and no {pickled.name}")
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
            raise LlavaError(f"{tensor.path} holds {tensor.name!r}: only plain LoRA can be merged")
        other = f"{target}.lora_{'B' if kind[0] == 'A' else 'A'}.weight"
        if other not in adapter:
            raise LlavaError(f"{tensor.path} holds {tensor.name!r} without its other half")
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
                "merge it with PEFT first"
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
            "numbers"
        ) from error
    if not is_positive(alpha):
        raise LlavaError(
            f"{folder / ADAPTER_CONFIG} has lora_alpha={alpha!r}: it must be a number above 0"
        )
    rank = math.prod(down.shape[:1])
    if not rank:
        raise LlavaError(f"{down.name!r} in {down.path} has no rows: its rank must be above 0")
    return alpha / (rank**0.5 if settings.get("use_rslora") else rank)


def _with_lora(
    weight: StoredTensor, down: StoredTensor, up: StoredTensor, scale: float
) -> StoredTensor:
    """weight [out, in] + scale * up [out, r] down [r, in]."""
    if (up.shape[:1] + down.shape[1:], up.shape[1:]) != (weight.shape, down.shape[:1]):
        raise LlavaError(
            f"{down.name!r} {list(down.shape)} and {up.name!r} {list(up.shape)} in {down.path} do "
            f"not fit {weight.name!r} {list(weight.shape)} in {weight.path}"
        )
    return computed(weight, lambda: float32(weight) + scale * (float32(up) @ float32(down)))


def _no_target(tensor: StoredTensor, name: str) -> LlavaError:
    return LlavaError(
        f"{tensor.path} holds {tensor.name!r}, but the base has no {name!r}: give the base model "
        "that the adapter was trained on"
    )
