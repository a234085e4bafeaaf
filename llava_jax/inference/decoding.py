"""Prefill and decode: the device side of generation, as pure functions over fixed shapes.

B rows, T prompt length, S cache size, I images a row, D model size, V vocabulary.
"""

import flax
import jax
import jax.numpy as jnp

from llava_jax.inference.sampling import Sampling, sample
from llava_jax.models.decoder import KVCache
from llava_jax.models.llava import LlavaModel

TOKENS_PER_CALL = 8  # enough to hide the dispatch, few enough to stream and to stop on text
NO_TOKEN = -1


@flax.struct.dataclass
class DecodeState:
    """Everything that a batch carries from one decode call to the next.

    Attributes:
      cache: what the rows have read.
      tokens: int32[B], each row's latest token, not yet in the cache.
      budget: int32[B], tokens each row may still produce; 0 in a finished row.
    """

    cache: KVCache
    tokens: jax.Array
    budget: jax.Array
    sampling: Sampling


def prefill(
    model: LlavaModel,
    params: dict,
    input_ids: jax.Array,
    lengths: jax.Array,
    images: jax.Array | None,
    budget: jax.Array,
    sampling: Sampling,
    stop_ids: jax.Array,
    cache_size: int,
) -> tuple[jax.Array, DecodeState]:
    """Reads the prompts and chooses the first token of each answer.

    Args:
      input_ids: int32[B, T], prompts padded on the right: slot s of the cache is position s.
      lengths: int32[B], real tokens in each row; 0 in a row that fills up the batch.
      images: uint8[B, I, side, side, 3] or None.
      budget: int32[B], tokens wanted of each row.
      stop_ids: int32[n], tokens that end an answer.
      cache_size: S, at least T.

    Returns:
      The first tokens int32[B] (NO_TOKEN where the budget was 0), and the state to decode from.
    """
    rows, length = input_ids.shape
    positions = jnp.broadcast_to(jnp.arange(length), input_ids.shape)
    segments = (positions < lengths[:, None]).astype(jnp.int32)
    cache = KVCache.empty(model.config.decoder, rows, cache_size, model.dtype)
    hidden, cache = model.apply({"params": params}, input_ids, images, positions, segments, cache)
    last = jnp.maximum(lengths - 1, 0)[:, None, None]
    # Only the last position needs logits: [B, V] instead of [B, T, V].
    hidden = jnp.take_along_axis(hidden, last, axis=1)[:, 0]
    logits = model.apply({"params": params}, hidden, method=LlavaModel.attend)
    tokens = sample(logits, sampling, lengths)
    state = DecodeState(cache, tokens, _spend(budget, tokens, stop_ids), sampling)
    return jnp.where(budget > 0, tokens, NO_TOKEN), state


def decode(
    model: LlavaModel, params: dict, state: DecodeState, stopped: jax.Array, stop_ids: jax.Array
) -> tuple[jax.Array, DecodeState]:
    """Up to TOKENS_PER_CALL more tokens of every unfinished row; ends early when all are finished.

    Args:
      stopped: bool[B], rows that the host has seen to be finished (a stop text).

    Returns:
      int32[B, TOKENS_PER_CALL], NO_TOKEN after a row's end, and the state to go on from.
    """
    state = state.replace(budget=jnp.where(stopped, 0, state.budget))
    tokens = jnp.full((len(stopped), TOKENS_PER_CALL), NO_TOKEN, jnp.int32)

    def unfinished(carry):
        step, state, _ = carry
        return (step < TOKENS_PER_CALL) & jnp.any(state.budget > 0)

    def one_token(carry):
        step, state, tokens = carry
        active = state.budget > 0
        state = _decode_one(model, params, state, stop_ids)
        column = jnp.where(active, state.tokens, NO_TOKEN)
        return step + 1, state, tokens.at[:, step].set(column)

    _, state, tokens = jax.lax.while_loop(unfinished, one_token, (0, state, tokens))
    return tokens, state


def _decode_one(model: LlavaModel, params: dict, state: DecodeState, stop_ids) -> DecodeState:
    """Reads each row's latest token and chooses the next; a finished row's cache stays as it is."""
    positions = state.cache.lengths[:, None]
    segments = (state.budget > 0)[:, None].astype(jnp.int32)
    hidden, cache = model.apply(
        {"params": params}, state.tokens[:, None], None, positions, segments, state.cache
    )
    logits = model.apply({"params": params}, hidden[:, 0], method=LlavaModel.attend)
    tokens = sample(logits, state.sampling, cache.lengths)
    budget = _spend(state.budget, tokens, stop_ids)
    return state.replace(cache=cache, tokens=tokens, budget=budget)


def _spend(budget, tokens, stop_ids):
    """The budget after one more token: none is left behind a token that ends the answer."""
    return jnp.where(jnp.isin(tokens, stop_ids), 0, jnp.maximum(budget - 1, 0))


def all_logits(
    model: LlavaModel,
    params: dict,
    input_ids: jax.Array,
    images: jax.Array | None,
    attention_mask: jax.Array,
) -> jax.Array:
    """Float32 logits [B, T, V] of whole sequences, padded on either side (mask int[B, T])."""
    positions = jnp.maximum(jnp.cumsum(attention_mask, axis=1) - 1, 0)
    hidden, _ = model.apply({"params": params}, input_ids, images, positions, attention_mask)
    return model.apply({"params": params}, hidden, method=LlavaModel.attend)
