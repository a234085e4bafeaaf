"""Prefill and decode: the device side of generation, as pure functions over fixed shapes.

B rows of the state, R rows read by one prefill, T tokens read, S cache size, C cache slots looked
at, F slots of image features, P tokens an image, D model size, V vocabulary.
"""

import flax
import jax
import jax.numpy as jnp

from llava_jax.inference.sampling import Logprobs, Sampling, logprobs_of, sample
from llava_jax.models.decoder import KVCache
from llava_jax.models.llava import LlavaModel

TOKENS_PER_CALL = 8  # enough to hide the dispatch, few enough to stream and to stop on text
POSITIONS_AT_A_TIME = 16  # of prompt logprobs: logits of a whole prompt never exist
NO_TOKEN = -1


@flax.struct.dataclass
class DecodeState:
    """What the rows of a batch carry from one call to the next; updated in place.

    Attributes:
      cache: what the rows have read. A row that ended keeps it, for prompts that begin alike.
      tokens: int32[B], each row's latest token, not yet in the cache.
      budget: int32[B], tokens each row may still produce; 0 in a finished row.
      seen: bool[B, V], tokens of the prompt and of the answer.
    """

    cache: KVCache
    tokens: jax.Array
    budget: jax.Array
    seen: jax.Array
    sampling: Sampling

    @classmethod
    def empty(cls, model: LlavaModel, rows: int, size: int, kv_dtype) -> "DecodeState":
        decoder = model.config.decoder
        return cls(
            KVCache.empty(decoder, rows, size, kv_dtype),
            jnp.zeros(rows, jnp.int32),
            jnp.zeros(rows, jnp.int32),
            jnp.zeros((rows, decoder.vocab_size), bool),
            jax.tree.map(jnp.asarray, Sampling.zeros(rows)),
        )


@flax.struct.dataclass
class Prompts:
    """Prompts to be read, each into a row of the state, behind what it shares with another row.

    Attributes:
      rows: int32[R], the row of each; B for one that only fills up the shape.
      donors: int32[R], the row whose cache begins alike.
      shared: int32[R], how many tokens of it are taken.
      input_ids: int32[R, T], the tokens behind those, padded on the right.
      feature_ids: int32[R, T], the image feature that stands for a token, as its place among the
        F * P of the store; NO_TOKEN where the token is text.
      lengths: int32[R], real tokens of `input_ids`.
      whole: int32[R, C], all text tokens of the prompt, NO_TOKEN elsewhere.
      budget: int32[R], tokens wanted.
    """

    rows: jax.Array
    donors: jax.Array
    shared: jax.Array
    input_ids: jax.Array
    feature_ids: jax.Array
    lengths: jax.Array
    whole: jax.Array
    budget: jax.Array
    sampling: Sampling


def encode(
    model: LlavaModel, params: dict, store: jax.Array, images: jax.Array, slots: jax.Array
) -> jax.Array:
    """The store [F, P, D] with the features of uint8[n, side, side, 3] at `slots` int32[n].

    A slot past the end drops an image that only fills up the shape.
    """
    features = model.apply({"params": params}, images, method=LlavaModel.encode_images)
    return store.at[slots].set(features.astype(store.dtype), mode="drop")


def prefill(
    model: LlavaModel, params: dict, state: DecodeState, store: jax.Array, prompts: Prompts
) -> tuple[jax.Array, Logprobs, DecodeState]:
    """Reads prompts into rows of the state and chooses the first token of each answer.

    Returns:
      The first tokens int32[R] (NO_TOKEN where the budget was 0), their logprobs, and the state.
    """
    size = prompts.whole.shape[1]
    cache = state.cache.rows(prompts.donors, size).replace(lengths=prompts.shared)
    hidden, cache = _read(model, params, store, prompts, cache)
    last = jnp.maximum(prompts.lengths - 1, 0)[:, None, None]
    # Only the last position needs logits: [R, V] instead of [R, T, V].
    hidden = jnp.take_along_axis(hidden, last, axis=1)[:, 0]
    logits = model.apply({"params": params}, hidden, method=LlavaModel.attend)
    seen = _mark(jnp.zeros(logits.shape, bool), prompts.whole)
    tokens = sample(logits, prompts.sampling, cache.lengths, seen)
    put = lambda old, new: old.at[prompts.rows].set(new, mode="drop")
    state = DecodeState(
        state.cache.put(prompts.rows, cache),
        put(state.tokens, tokens),
        put(state.budget, _spend(prompts.budget, tokens, prompts.sampling)),
        put(state.seen, _mark(seen, tokens[:, None])),
        jax.tree.map(put, state.sampling, prompts.sampling),
    )
    tokens = jnp.where(prompts.budget > 0, tokens, NO_TOKEN)
    return tokens, _logprobs(logits, tokens, prompts.sampling), state


def _read(model: LlavaModel, params: dict, store, prompts: Prompts, cache: KVCache | None):
    """Hidden states [R, T, D] of `prompts.input_ids`, and the cache with them in it."""
    offsets = jnp.arange(prompts.input_ids.shape[1])
    positions = prompts.shared[:, None] + offsets
    segments = (offsets < prompts.lengths[:, None]).astype(jnp.int32)
    is_image = prompts.feature_ids >= 0

    def merged(model: LlavaModel):
        embeddings = model.decoder.embed(jnp.maximum(prompts.input_ids, 0))
        features = store.reshape(-1, store.shape[-1])[jnp.maximum(prompts.feature_ids, 0)]
        embeddings = jnp.where(is_image[..., None], features.astype(embeddings.dtype), embeddings)
        return model.decoder(embeddings, positions, segments, cache)

    return model.apply({"params": params}, method=merged)


def decode(
    model: LlavaModel,
    params: dict,
    state: DecodeState,
    running: jax.Array,
    fewest: jax.Array,
    window: int,
) -> tuple[jax.Array, Logprobs, DecodeState]:
    """Up to TOKENS_PER_CALL more tokens of every unfinished row.

    Args:
      running: bool[B], rows that the host wants more tokens of.
      fewest: int32, ends early when fewer rows than this are left, so that others can come in.
      window: cache slots to look at; no running row may outgrow them in this call.

    Returns:
      int32[B, TOKENS_PER_CALL], NO_TOKEN after a row's end, their logprobs, and the state.
    """
    state = state.replace(
        budget=jnp.where(running, state.budget, 0), cache=state.cache.replace(window=window)
    )
    rows = len(state.tokens)
    tokens = jnp.full((rows, TOKENS_PER_CALL), NO_TOKEN, jnp.int32)

    def unfinished(carry):
        step, state, *_ = carry
        return (step < TOKENS_PER_CALL) & (jnp.sum(state.budget > 0) >= fewest)

    def one_token(carry):
        step, state, tokens, logprobs = carry
        active = state.budget > 0
        state, new = _decode_one(model, params, state)
        column = jnp.where(active, state.tokens, NO_TOKEN)
        logprobs = jax.tree.map(lambda all, one: all.at[:, step].set(one), logprobs, new)
        return step + 1, state, tokens.at[:, step].set(column), logprobs

    carry = (0, state, tokens, Logprobs.zeros(rows, TOKENS_PER_CALL))
    _, state, tokens, logprobs = jax.lax.while_loop(unfinished, one_token, carry)
    return tokens, logprobs, state.replace(cache=state.cache.replace(window=None))


def _decode_one(model: LlavaModel, params: dict, state: DecodeState):
    """Reads each row's latest token and chooses the next; a finished row's cache stays as it is."""
    positions = state.cache.lengths[:, None]
    segments = (state.budget > 0)[:, None].astype(jnp.int32)

    def text(model: LlavaModel):
        # Not `model(...)`: a chosen token is text, even one that in a prompt stands for an image.
        return model.decoder(
            model.decoder.embed(state.tokens[:, None]), positions, segments, state.cache
        )

    hidden, cache = model.apply({"params": params}, method=text)
    logits = model.apply({"params": params}, hidden[:, 0], method=LlavaModel.attend)
    tokens = sample(logits, state.sampling, cache.lengths, state.seen)
    state = state.replace(
        cache=cache,
        tokens=tokens,
        budget=_spend(state.budget, tokens, state.sampling),
        seen=_mark(state.seen, tokens[:, None]),
    )
    return state, _logprobs(logits, tokens, state.sampling)


def _spend(budget, tokens, sampling: Sampling):
    """The budget after one more token: none is left behind a token that ends the answer."""
    ended = jnp.any(tokens[:, None] == sampling.stop_ids, axis=1)
    return jnp.where(ended, 0, jnp.maximum(budget - 1, 0))


def _mark(seen, tokens):
    """bool[B, V] with tokens int32[B, n] marked; ids below 0 are no tokens."""
    places = jnp.where(tokens >= 0, tokens, seen.shape[1])
    return seen.at[jnp.arange(len(seen))[:, None], places].set(True, mode="drop")


def _logprobs(logits, tokens, sampling: Sampling) -> Logprobs:
    """Of the chosen tokens; zeros where no row wants them, since ranking a vocabulary is slow."""
    return jax.lax.cond(
        jnp.any(sampling.logprobs),
        lambda: logprobs_of(logits, jnp.maximum(tokens, 0)),
        lambda: Logprobs.zeros(len(tokens)),
    )


def prompt_logprobs(
    model: LlavaModel, params: dict, store: jax.Array, prompts: Prompts, targets: jax.Array
) -> Logprobs:
    """[R, T] of int32 targets[R, T], the token behind each of whole prompts (nothing shared)."""
    hidden, _ = _read(model, params, store, prompts, None)
    pieces = (-1, POSITIONS_AT_A_TIME, hidden.shape[-1])

    def some(piece):
        hidden, targets = piece
        logits = model.apply({"params": params}, hidden, method=LlavaModel.attend)
        return logprobs_of(logits, jnp.maximum(targets, 0))

    told = jax.lax.map(some, (hidden.reshape(pieces), targets.reshape(pieces[:2])))
    return jax.tree.map(lambda x: x.reshape(*targets.shape, *x.shape[2:]), told)


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
