"""The values of a config: those that no run could use, and what differs between two runs."""

import importlib.util
import math
from collections.abc import Sequence

from ml_collections import ConfigDict

from llava_jax.data.boxes import CONVENTIONS
from llava_jax.errors import LlavaError
from llava_jax.models.attention import IMPLEMENTATIONS
from llava_jax.models.precision import PRECISIONS
from llava_jax.models.remat import REMAT_POLICIES
from llava_jax.text.templates import TURNS, get_template
from llava_jax.training.preferences import check_preferences
from llava_jax.training.step import PARITY_DEVICES
from llava_jax.weights.run_directory import COMPONENTS

# What may differ when a run is resumed: it changes speed, logs or place, never the result.
FREE_KEYS = ("workdir", "accumulation", "mesh", "log_every", "save_every", "keep", "wandb_project")
FREE_KEYS += ("model.remat_policy", "model.attention", "data.workers", "features", "loss_chunk")
RANGES = {  # message -> (condition on a value that is set, keys)
    "it must be at least 1": (
        lambda x: x >= 1,
        "batch_size accumulation epochs steps log_every validate_every save_every keep loss_chunk "
        "sample_tokens data.max_length data.row_length data.max_tiles",
    ),
    "it must not be negative": (
        lambda x: x >= 0,
        "seed samples data.images_per_row data.workers data.bad_image_ceiling optimizer.clip_norm "
        "optimizer.weight_decay features.gigabytes",
    ),
    "it must be greater than 0": (lambda x: x > 0, "lora.alpha optimizer.eps dpo.beta"),
    "it is a share, from 0 to 1": (lambda x: 0 <= x <= 1, "data.flip"),
    "it is a share, from 0 to less than 1": (
        lambda x: 0 <= x < 1,
        "data.crop lora.dropout optimizer.warmup_ratio optimizer.b1 optimizer.b2",
    ),
}


def check_config(config: ConfigDict) -> None:
    """Raises LlavaError for values that no run could use."""
    needed = {"workdir": config.workdir, "data.train": config.data.train}
    for key, value in needed.items():
        if not value:
            raise LlavaError(f"config.{key} is empty: set it in the config or with --config.{key}=")
    if "://" in config.workdir:
        raise LlavaError(
            f"config.workdir is {config.workdir}: a run lives in a folder of a file system, not in "
            "a bucket; name a local or mounted folder, and copy it to the bucket afterwards"
        )
    if not config.trainable:
        raise LlavaError("config.trainable is empty: name what trains, such as projector")
    if (config.epochs is None) == (config.steps is None):
        raise LlavaError("set exactly one of config.epochs and config.steps")
    values = flatten(config.to_dict())
    for wanted, (holds, keys) in RANGES.items():
        for key in keys.split():
            if values[key] is not None and not holds(values[key]):
                raise LlavaError(f"config.{key} is {values[key]}: {wanted}")
    for group, rate in config.trainable.items():
        if group.split("/")[0] not in (*COMPONENTS, "lora"):
            raise LlavaError(
                f"config.trainable names {group}, which no parameter belongs to: the model has "
                f"{', '.join(COMPONENTS)}, lora and their sub-trees, such as decoder/layers"
            )
        if not 0 <= rate < math.inf:
            raise LlavaError(f"config.trainable.{group} is {rate}: a learning rate is 0 or more")
    if config.parity and config.batch_size % PARITY_DEVICES:
        raise LlavaError(
            f"config.parity cuts a batch into {PARITY_DEVICES} equal parts, but "
            f"config.batch_size is {config.batch_size}: make it a multiple"
        )
    choices = {
        "loss": (config.loss, ["answers", "dpo"]),
        "data.turns": (config.data.turns, list(TURNS)),
        "data.labels": (config.data.labels, [None, "original"]),
        "model.remat_policy": (config.model.remat_policy, list(REMAT_POLICIES)),
        "model.dtype": (config.model.dtype, ["auto", *PRECISIONS]),
        "model.attention": (config.model.attention, ["auto", *IMPLEMENTATIONS]),
        "model.quantize": (config.model.quantize, [None, "int8"]),
        "data.box_convention": (config.data.box_convention, list(CONVENTIONS)),
        "optimizer.moments_dtype": (config.optimizer.moments_dtype, ["float32", "bfloat16"]),
    }
    for key, (value, allowed) in choices.items():
        if value not in allowed:
            known = ", ".join(map(str, allowed))
            raise LlavaError(f"config.{key} is {value!r}: choose one of {known}")
    get_template(config.model.template)
    check_preferences(config)
    if config.wandb_project and not importlib.util.find_spec("wandb"):
        raise LlavaError(
            f"config.wandb_project is {config.wandb_project!r} but wandb is not installed: "
            "pip install wandb"
        )


def differences(old: dict, new: dict) -> list[str]:
    """The differences between two recipes that keep one from continuing the run of the other."""
    old, new = flatten(old), flatten(new)
    keys = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))
    is_free = lambda key: any(key == f or key.startswith(f + ".") for f in FREE_KEYS)
    return [f"{k}: {old.get(k)!r} -> {new.get(k)!r}" for k in keys if not is_free(k)]


def with_later_options(old: dict, defaults: dict, free: Sequence[str] = ()) -> dict:
    """An old recipe with the options that have come since, which it had at their defaults.

    Args:
      defaults: all options of today.
      free: sections whose keys are up to the recipe.
    """
    later = {k: v for k, v in flatten(defaults).items() if k.split(".")[0] not in free}
    return later | flatten(old)


def flatten(config: dict, prefix: str = "") -> dict:
    """Nested dict -> {"a.b": value}."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
