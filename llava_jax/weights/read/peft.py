"""LoRA adapters as PEFT saves them, merged into the tensors of their base as those are read.

A key of an adapter is a module's name and what was trained there:

    base_model.model. model.language_model.layers.0.self_attn.q_proj  .lora_A.weight

and others in `_KEY`. All is computed in float32, one tensor at a time, as PEFT's own `merge` does.
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
from llava_jax.weights.formats.safetensors_files import read_header
from llava_jax.weights.read.fields import is_positive, read_json
from llava_jax.weights.read.merging import computed, float32
from llava_jax.weights.tensors import StoredTensor

ADAPTER_CONFIG = "adapter_config.json"
# Settings of PEFT under which the sums below would be wrong -> what is fine.
_FINE_SETTINGS = {
    "peft_type": ("LORA",),
    "fan_in_fan_out": (None, False),
    "bias": (None, "none"),  # not all of PEFT's versions save the biases that they train
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (None, False),
    "use_bdlora": (None, False),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    # The others (PiSSA, OLoRA, LoftQ, CorDA, LoRA-GA) change the base weights too.
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal"),
}
# Levels of names that wrappers of PyTorch put in, and PEFT's own.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module)\.|^module\.")
# What stands behind a module's name. `.default`, the adapter's name, is in raw state dicts.
_KEY = re.compile(
    r"(?P<module>.+?)\.(?:"
    r"(?P<kind>lora_A|lora_B)(?:\.(?!weight|bias)\w+)?\.(?P<leaf>weight|bias)"
    r"|(?P<plain>lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.(?!weight)\w+)?(?:\.weight)?"
    r"|token_adapter\.(?P<rows>trainable_tokens_delta)(?:\.\w+)?"
    r"|(?P<unused>original_module\..+|token_adapter\.\w+.*)"
    r"|base_layer\.(?P<base>weight|bias)"
    r"|modules_to_save(?:\.(?!weight|bias)\w+)?\.(?P<saved>.+)"
    r")"
)


@dataclasses.dataclass(frozen=True)
class Trained:
    """One tensor of an adapter.

    Attributes:
      tensor: where it is.
      module: the name of the module that it belongs to, as the adapter has it.
      kind: "whole" for a tensor in place of the base's; `lora_A.weight`, `lora_B.weight`,
        `lora_B.bias`, `lora_embedding_A`, `lora_embedding_B`, `lora_magnitude_vector`; or
        `trainable_tokens_delta`, new rows of a table.
      name: of the base's tensor that it changes.
    """

    tensor: StoredTensor
    module: str
    kind: str
    name: str


def open_adapter(folder: Path, allow_pickle: bool) -> list[Trained]:
    """The tensors of PEFT's `adapter_model` file."""
    verify_checksums(folder)
    safe, pickled = folder / "adapter_model.safetensors", folder / "adapter_model.bin"
    if safe.exists():
        tensors = read_header(safe)
    elif pickled.exists():
        tensors = open_pickle(pickled, allow_pickle).values()
    else:
        raise LlavaError(f"{folder} has {ADAPTER_CONFIG} but no {safe.name} and no {pickled.name}")
    trained = [_trained(tensor) for tensor in tensors]
    return [one for one in trained if one is not None]


def _trained(tensor: StoredTensor) -> Trained | None:
    """What a key says; None for a copy of the base that is not needed."""
    name = _WRAPPERS.sub("", tensor.name)
    name = name.removeprefix("base_model.model.")
    match = _KEY.fullmatch(name)
    if match is None:
        if ".lora_" in name:
            raise LlavaError(
                f"{tensor.path} holds {tensor.name!r}, a kind of LoRA that cannot be merged here: "
                "merge it with PEFT first"
            )
        return Trained(tensor, name.rpartition(".")[0], "whole", name)
    if match["unused"]:
        return None
    module = match["module"]
    whole = match["base"] or match["saved"]
    if whole:
        return Trained(tensor, module, "whole", f"{module}.{whole}")
    kind = match["plain"] or match["rows"] or f"{match['kind']}.{match['leaf']}"
    ending = "bias" if kind == "lora_B.bias" else "weight"
    return Trained(tensor, module, kind, f"{module}.{ending}")


def merge_adapter(
    folder: Path, base: Mapping[str, StoredTensor], adapter: list[Trained]
) -> dict[str, StoredTensor]:
    """The base with an adapter merged: W + alpha / r * B A, and what else PEFT trains.

    Args:
      folder: of the adapter, with PEFT's `adapter_config.json`.
      base: tensors by name; `Trained.name` is one of them.
    Raises:
      LlavaError: a variant of LoRA that is no such sum, or an adapter that does not fit the base.
    """
    settings = _fine_settings(folder)
    merged = dict(base)
    changes: dict[str, dict[str, Trained]] = {}
    for one in adapter:
        if one.name not in base:
            raise LlavaError(
                f"{one.tensor.path} holds {one.tensor.name!r}, but the base has no {one.name!r}: "
                "give the base model that the adapter was trained on"
            )
        if one.kind == "whole":
            merged[one.name] = one.tensor
        elif one.kind in changes.setdefault(one.name, {}):
            raise LlavaError(
                f"{one.tensor.path} holds {one.tensor.name!r} twice, under two spellings"
            )
        else:
            changes[one.name][one.kind] = one
    for name, found in changes.items():
        bias, rows = found.get("lora_B.bias"), found.get("trainable_tokens_delta")
        if rows is not None:
            indices = _token_indices(settings, folder, rows)
            merged[name] = _with_rows(merged[name], rows.tensor, indices)
        elif bias is not None:
            halves = changes.get(f"{name.removesuffix('bias')}weight", found)
            scale = _scale(settings, folder, halves)
            merged[name] = _with_bias(merged[name], bias.tensor, scale)
        else:
            _check_dora(settings, folder, found)
            merged[name] = _with_lora(merged[name], found, _scale(settings, folder, found))
    return merged


def _check_dora(settings: dict, folder: Path, found: Mapping[str, Trained]) -> None:
    """Raises LlavaError if the settings and the tensors of a layer disagree about DoRA."""
    dora = bool(settings.get("use_dora"))
    if dora != ("lora_magnitude_vector" in found):
        module = next(iter(found.values())).module
        raise LlavaError(
            f"{folder / ADAPTER_CONFIG} has use_dora={dora}, but the adapter holds "
            f"{'no' if dora else 'a'} lora_magnitude_vector for {module}"
        )


def unties(adapter: list[Trained]) -> bool:
    """Whether an adapter of a language model with tied weights makes two tables of one.

    PEFT trains the table or the head alone then; rows for chosen tokens change both.
    """
    tied = ("model.embed_tokens.weight", "lm_head.weight")
    return any(one.name in tied and one.kind != "trainable_tokens_delta" for one in adapter)


def _fine_settings(folder: Path) -> dict:
    settings = read_json(folder / ADAPTER_CONFIG)
    for key, fine in _FINE_SETTINGS.items():
        value = settings.get(key)
        if value not in fine:
            raise LlavaError(
                f"{folder / ADAPTER_CONFIG} has {key}={value!r}: such an adapter is more than a "
                "change of the base's weights that it holds; merge it with PEFT first"
            )
    return settings


def _halves(found: Mapping[str, Trained]) -> tuple[Trained, Trained]:
    """(A, B) of a linear layer or of an embedding table; LlavaError for one without the other."""
    for down, up in (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")):
        if down in found and up in found:
            return found[down], found[up]
    tensor = next(iter(found.values())).tensor
    raise LlavaError(f"{tensor.path} holds {tensor.name!r} without its other half")


def _scale(settings: dict, folder: Path, found: Mapping[str, Trained]) -> float:
    """alpha / rank, or with rank stabilisation alpha / sqrt(rank); patterns name modules."""
    down, _ = _halves(found)
    alpha, patterns = settings.get("lora_alpha"), settings.get("alpha_pattern") or {}
    try:
        for pattern, value in patterns.items():
            if re.fullmatch(rf"(.*\.)?({pattern})", down.module):
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
    rank = math.prod(down.tensor.shape[:1])
    if not rank:
        raise LlavaError(
            f"{down.tensor.name!r} in {down.tensor.path} has no rows: its rank must be above 0"
        )
    return alpha / (rank**0.5 if settings.get("use_rslora") else rank)


def _token_indices(settings: dict, folder: Path, delta: Trained) -> list[int]:
    """The rows of a table that were trained, in the order of `trainable_tokens_delta`."""
    given = settings.get("trainable_token_indices")
    table = delta.module.rpartition(".")[2]
    rows = given.get(table) if isinstance(given, dict) else given
    if not isinstance(rows, list) or not all(type(row) is int and row >= 0 for row in rows):
        raise LlavaError(
            f"{folder / ADAPTER_CONFIG} has trainable_token_indices={given!r}: it must list the "
            f"rows of {table} that {delta.tensor.name!r} holds"
        )
    return rows


def _with_lora(weight: StoredTensor, found: Mapping[str, Trained], scale: float) -> StoredTensor:
    """A weight with the product of its two halves added.

    A linear layer: W [out, in] + scale * B [out, r] A [r, in]; a convolution likewise, its patch
    axes flat; an embedding table: W [V, D] + scale * (B [D, r] A [r, V])^T. DoRA then gives each
    row of W [out, in] its length.
    """
    down, up = (half.tensor for half in _halves(found))
    table = "lora_embedding_A" in found
    rank, outer = down.shape[:1], down.shape[1:]
    width = up.shape[:1]
    fits = (outer + width if table else width + outer) == weight.shape
    if not fits or up.shape[1:2] != rank or math.prod(up.shape[2:]) != 1:
        raise LlavaError(
            f"{down.name!r} {list(down.shape)} and {up.name!r} {list(up.shape)} in {down.path} do "
            f"not fit {weight.name!r} {list(weight.shape)} in {weight.path}"
        )
    length = found.get("lora_magnitude_vector")
    if length is not None and (table or len(weight.shape) != 2 or length.tensor.shape != width):
        raise LlavaError(
            f"{length.tensor.path} holds {length.tensor.name!r}: DoRA can be merged into linear "
            "layers alone; merge it with PEFT first"
        )

    def values() -> np.ndarray:
        product = float32(up).reshape(*width, -1) @ float32(down).reshape(*rank, -1)
        product = product.T if table else product
        merged = float32(weight) + np.float32(scale) * product.reshape(weight.shape)
        if length is not None:
            norms = np.linalg.norm(merged, axis=1)
            merged *= (float32(length.tensor) / norms)[:, None]
        return merged

    return computed(weight, values)


def _with_bias(bias: StoredTensor, added: StoredTensor, scale: float) -> StoredTensor:
    return _sized(bias, added, lambda: float32(bias) + np.float32(scale) * float32(added))


def _with_rows(table: StoredTensor, rows: StoredTensor, indices: list[int]) -> StoredTensor:
    """A table [V, D] with some rows replaced."""
    if rows.shape != (len(indices), *table.shape[1:]) or max(indices, default=0) >= table.shape[0]:
        raise LlavaError(
            f"{rows.name!r} {list(rows.shape)} in {rows.path} does not fit {len(indices)} rows of "
            f"{table.name!r} {list(table.shape)} in {table.path}"
        )

    def values() -> np.ndarray:
        changed = float32(table)
        changed[indices] = float32(rows)
        return changed

    return computed(table, values)


def _sized(
    tensor: StoredTensor, other: StoredTensor, values: Callable[[], np.ndarray]
) -> StoredTensor:
    if tensor.shape != other.shape:
        raise LlavaError(
            f"{other.name!r} {list(other.shape)} in {other.path} does not fit {tensor.name!r} "
            f"{list(tensor.shape)} in {tensor.path}"
        )
    return computed(tensor, values)
