"""The choice of the next token from its logits.

B rows, V vocabulary.
"""

import math
import numbers
from dataclasses import dataclass

import flax
import jax
import jax.numpy as jnp

from llava_jax.errors import LlavaError


@dataclass(frozen=True)
class SamplingParams:
    """How one answer is chosen; LlavaError for a value out of its range.

    Attributes:
      max_new_tokens: length limit; an answer also ends where the model's positions do.
      temperature: 0 takes the likeliest token each time; otherwise tokens are drawn.
      top_p: draw only among the likeliest tokens that together reach this probability.
      seed: the same prompt and seed draw the same answer, whatever else is in the batch.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        whole, real = numbers.Integral, numbers.Real
        if not isinstance(self.max_new_tokens, whole) or self.max_new_tokens < 1:
            raise LlavaError(
                f"max_new_tokens must be a whole number from 1, not {self.max_new_tokens!r}"
            )
        if not isinstance(self.temperature, real) or not 0 <= self.temperature < math.inf:
            raise LlavaError(f"temperature must be a number from 0, not {self.temperature!r}")
        if not isinstance(self.top_p, real) or not 0 < self.top_p <= 1:
            raise LlavaError(f"top_p must be above 0 and at most 1, not {self.top_p!r}")
        if not isinstance(self.seed, whole) or not 0 <= self.seed < 2**32:
            raise LlavaError(f"seed must be a whole number from 0 to 2**32 - 1, not {self.seed!r}")


@flax.struct.dataclass
class Sampling:
    """The settings of a whole batch, on the device.

    Attributes:
      temperature: float32[B]; 0 takes the likeliest token.
      top_p: float32[B] in (0, 1]; only the likeliest tokens that together reach it may be drawn.
      seed: uint32[B]. Nothing else enters a row's random numbers but the position of the token,
        so a row is drawn the same whatever it is batched with.
    """

    temperature: jax.Array
    top_p: jax.Array
    seed: jax.Array


def sample(logits: jax.Array, sampling: Sampling, positions: jax.Array) -> jax.Array:
    """Next tokens int32[B].

    Args:
      logits: float32[B, V].
      positions: int[B], where in its row each token will stand.
    """
    # A greedy batch, the usual case, must not pay for sorting the vocabulary.
    return jax.lax.cond(
        jnp.any(sampling.temperature > 0), _draw, _greedy, logits, sampling, positions
    )


def _greedy(logits, sampling, positions):
    del sampling, positions
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def _draw(logits, sampling: Sampling, positions):
    hot = sampling.temperature > 0
    scaled = logits / jnp.where(hot, sampling.temperature, 1.0)[:, None]
    kept = keep_top_p(scaled, sampling.top_p)
    keys = jax.vmap(lambda seed, at: jax.random.fold_in(jax.random.key(seed), at))(
        sampling.seed, positions
    )
    drawn = jax.vmap(jax.random.categorical)(keys, kept).astype(jnp.int32)
    return jnp.where(hot, drawn, _greedy(logits, sampling, positions))


def keep_top_p(logits: jax.Array, top_p: jax.Array) -> jax.Array:
    """Logits [B, V] with all but the smallest set of probability >= top_p [B] at -inf.

    Nucleus sampling (https://arxiv.org/abs/1904.09751); tokens as likely as the last one kept stay.
    """
    ranked = jnp.sort(logits, axis=-1, descending=True)
    probability = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    inside = (before < top_p[:, None]) | (top_p[:, None] >= 1)
    threshold = jnp.min(jnp.where(inside, ranked, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= threshold, logits, -jnp.inf)
