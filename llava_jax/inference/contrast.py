"""Contrastive decoding: a token must be likelier with the picture than without it.

    logits + alpha * (logits - logits of the same prompt with a worse picture, or none)

among the tokens whose probability given the picture is at least beta of the largest, so that a
token which neither prompt likes is never chosen. https://arxiv.org/abs/2311.16922 and the authors'
code: alpha 1, beta 0.1.

B rows, V vocabulary.
"""

import flax
import jax
import jax.numpy as jnp
import numpy as np

from llava_jax.inference.sampling import (
    Logprobs,
    Sampling,
    SamplingParams,
    forbid_ends,
    sample,
    wanted_logprobs,
)


@flax.struct.dataclass
class Contrast:
    """Which rows are pairs: a prompt, and its twin that shows the worse picture.

    Both rows read the token that is chosen for the prompt. Example: rows 0 and 3 are a pair, 1 and
    2 are prompts without contrast:

        twins    3 1 2 3      the row whose logits are taken away
        leaders  0 1 2 0      the row whose token is taken
        alpha    1 0 0 0
        beta    .1 0 0 0

    Attributes:
      twins, leaders: int32[B].
      alpha, beta: float32[B].
    """

    twins: jax.Array
    leaders: jax.Array
    alpha: jax.Array
    beta: jax.Array

    @classmethod
    def none(cls, rows: int) -> "Contrast":
        """Of rows without a pair, as NumPy arrays to be filled in."""
        own = np.arange(rows, dtype=np.int32)
        return cls(own, own.copy(), np.zeros(rows, np.float32), np.zeros(rows, np.float32))

    def pair(self, row: int, twin: int, params: SamplingParams) -> None:
        """Makes a pair of a prompt's row and its twin's."""
        self.twins[row], self.leaders[twin] = twin, row
        self.alpha[row], self.beta[row] = params.contrast_alpha, params.contrast_beta


def contrasted(logits: jax.Array, contrast: Contrast) -> jax.Array:
    """The logits [B, V] of each prompt less those of its twin; of other rows as they are."""
    others = logits[contrast.twins]
    least = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(contrast.beta)[:, None]
    plausible = (logits >= least) & (logits > -jnp.inf)  # infinity less infinity is no number
    difference = contrast.alpha[:, None] * (logits - others)
    return jnp.where(plausible, logits + difference, -jnp.inf)


def choose(
    logits: jax.Array,
    sampling: Sampling,
    positions: jax.Array,
    seen: jax.Array,
    contrast: Contrast | None,
) -> tuple[jax.Array, Logprobs]:
    """Next tokens int32[B] and their log probabilities; arguments as in `sample`.

    contrast: None if no row has a twin.
    """
    if contrast is not None:
        # Before the limit of beta: if it left only ends, and no end is allowed yet, nothing would
        # be left to choose. Of other rows the log probabilities are those of the plain logits.
        paired = contrast.twins != jnp.arange(len(logits))
        allowed = forbid_ends(logits, sampling, positions)
        logits = jnp.where(paired[:, None], contrasted(allowed, contrast), logits)
    tokens = sample(logits, sampling, positions, seen)
    logprobs = wanted_logprobs(logits, tokens, sampling)
    return (tokens if contrast is None else tokens[contrast.leaders]), logprobs
