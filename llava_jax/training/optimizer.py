"""AdamW with a learning rate for each group of parameters and one shared schedule shape."""

import difflib

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from llava_jax.errors import LlavaError

DECAYED = ("kernel", "embedding", "newline", "lora_a", "lora_b")


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
        known = {"/".join(path[:depth]) for path in flat for depth in range(1, len(path) + 1)}
        close = difflib.get_close_matches(sorted(unused)[0], sorted(known), 1)
        raise LlavaError(
            f"config.trainable names {sorted(unused)}, which no parameter belongs to: the model "
            f"has {sorted(params)} and their sub-trees, such as {(close or ['decoder/layers'])[0]}"
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
    moments_dtype: str = "float32",
) -> optax.GradientTransformation:
    """AdamW over the trainable tree alone; clipping sees the norm over all groups.

    Weight decay spares biases, norms and layer scales. `moments_dtype` is the dtype in which both
    moments are stored between steps: float32, or bfloat16 by `stochastic_moments`.
    """
    adam = optax.scale_by_adam(b1, b2, eps)
    if moments_dtype != "float32":
        adam = stochastic_moments(adam)

    def by_rate(updates, params):
        del params
        flat = flatten_dict(updates)
        return unflatten_dict({p: -groups[group_of(p, groups)] * u for p, u in flat.items()})

    def decayed(params):
        flat = flatten_dict(params)
        return unflatten_dict({p: p[-1] in DECAYED for p in flat})

    return optax.chain(
        clip(clip_norm) if clip_norm else optax.identity(),
        adam,
        optax.add_decayed_weights(weight_decay, decayed) if weight_decay else optax.identity(),
        optax.stateless(by_rate),
        optax.scale_by_schedule(schedule),
    )


def clip(norm: float) -> optax.GradientTransformation:
    """Scales gradients down to a global norm if their own is larger.

    Equal to `optax.clip_by_global_norm` up to rounding. That one divides by the norm and multiplies
    by the limit, and XLA writes the quotients, a second set of gradients, to memory.
    """

    def update(updates, params=None):
        del params
        factor = jnp.minimum(1, norm / optax.tree.norm(updates))
        return jax.tree.map(lambda u: u * factor, updates)

    return optax.stateless(update)


def stochastic_moments(adam: optax.GradientTransformation) -> optax.GradientTransformation:
    """Adam in float32 with moments stored in bfloat16 between steps: 4 bytes a parameter, not 8.

    Rounded to nearest, the second moment would stand still: at b2 = 0.999 a step changes it by a
    thousandth of the difference, and bfloat16 has 8 bits. Stochastic rounding keeps its mean (Gupta
    et al. 2015, arXiv:1502.02551; for optimizer state, Zamirai et al. 2020, arXiv:2010.06192). The
    random bits depend on step and leaf alone, so a resumed run repeats them on any mesh.
    """

    def stored(moments, key):
        leaves, structure = jax.tree.flatten(moments)
        keys = jax.random.split(key, len(leaves)) if leaves else ()
        rounded = [round_stochastically(*pair) for pair in zip(leaves, keys, strict=True)]
        return jax.tree.unflatten(structure, rounded)

    def cast(state, dtype):
        moments = (optax.tree.cast(state.mu, dtype), optax.tree.cast(state.nu, dtype))
        return state._replace(mu=moments[0], nu=moments[1])

    def update(updates, state, params=None):
        updates, state = adam.update(updates, cast(state, jnp.float32), params)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), state.count))
        return updates, state._replace(mu=stored(state.mu, keys[0]), nu=stored(state.nu, keys[1]))

    return optax.GradientTransformation(lambda p: cast(adam.init(p), jnp.bfloat16), update)


def round_stochastically(x: jax.Array, key: jax.Array) -> jax.Array:
    """Finite float32 -> one of the two neighbours in bfloat16, so that the mean over keys is x."""
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    # bfloat16 is the upper half of float32: a random lower half carries with the right chance.
    bits = (jax.lax.bitcast_convert_type(x, jnp.uint32) + noise) >> 16
    return jax.lax.bitcast_convert_type(bits.astype(jnp.uint16), jnp.bfloat16)


def optimizer_shardings(optimizer, trainable, shardings, replicated):
    """Shardings of the optimizer state: moments are placed like their parameters."""
    state = jax.eval_shape(optimizer.init, trainable)
    return optax.tree.map_params(
        optimizer,
        lambda _, sharding: sharding,
        state,
        shardings,
        transform_non_params=lambda _: replicated,
    )
