"""AdamW with a learning rate for each group of parameters and one shared schedule shape."""

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from llava_jax.errors import LlavaError


def group_of(path: tuple[str, ...], groups: dict[str, float]) -> str | None:
    """The longest key of `groups` that is a prefix of the parameter's path, or None (frozen)."""
    matches = [g for g in groups if path[: g.count("/") + 1] == tuple(g.split("/"))]
    return max(matches, key=len, default=None)


def split_params(params: dict, groups: dict[str, float]) -> tuple[dict, dict]:
    """Parameters as two trees, trainable and frozen.

    Args:
      params: the whole nested dict.
      groups: path prefix such as `projector` or `decoder/layers` -> peak learning rate.

    Raises:
      LlavaError: a group that names no parameter.
    """
    flat = flatten_dict(params)
    owners = {path: group_of(path, groups) for path in flat}
    unused = set(groups) - set(owners.values())
    if unused:
        raise LlavaError(
            f"config.trainable names {sorted(unused)}, which no parameter belongs to: "
            f"the model has {sorted(params)} and their sub-trees, such as decoder/layers"
        )
    trainable = {path: leaf for path, leaf in flat.items() if owners[path]}
    frozen = {path: leaf for path, leaf in flat.items() if not owners[path]}
    return unflatten_dict(trainable), unflatten_dict(frozen)


def merge_params(trainable: dict, frozen: dict) -> dict:
    """The inverse of `split_params`."""
    return unflatten_dict({**flatten_dict(trainable), **flatten_dict(frozen)})


def warmup_cosine(total_steps: int, warmup_ratio: float):
    """Share of the peak rate at a step: linear warm-up, then cosine to 0, as in Hugging Face."""
    warmup = int(-(-total_steps * warmup_ratio // 1))

    def schedule(step):
        rising = step / max(warmup, 1)
        progress = (step - warmup) / max(total_steps - warmup, 1)
        falling = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(progress, 0, 1)))
        return jnp.where(step < warmup, rising, falling)

    return schedule


def adamw(
    groups: dict[str, float],
    schedule,
    *,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    clip_norm: float | None,
) -> optax.GradientTransformation:
    """AdamW over the trainable tree alone; clipping sees the norm over all groups.

    Weight decay spares biases, norms and layer scales.
    """

    def by_rate(updates, params):
        del params
        flat = flatten_dict(updates)
        return unflatten_dict({p: -groups[group_of(p, groups)] * u for p, u in flat.items()})

    def decayed(params):
        flat = flatten_dict(params)
        return unflatten_dict({p: p[-1] in ("kernel", "embedding") for p in flat})

    return optax.chain(
        optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity(),
        optax.scale_by_adam(b1, b2, eps),
        optax.add_decayed_weights(weight_decay, decayed) if weight_decay else optax.identity(),
        optax.stateless(by_rate),
        optax.scale_by_schedule(schedule),
    )


def optimizer_shardings(optimizer, trainable, shardings, replicated):
    """Shardings of the optimizer state: moments lie where their parameters do."""
    state = jax.eval_shape(optimizer.init, trainable)
    return optax.tree.map_params(
        optimizer,
        lambda _, sharding: sharding,
        state,
        shardings,
        transform_non_params=lambda _: replicated,
    )
