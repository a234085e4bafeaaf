"""Prefill and decode: the device side of generation, as pure functions over fixed shapes.

B rows of the state, S cache size, C cache slots looked at, F slots of image features, P tokens an
image, D model size, V vocabulary; of one prefill: Q tokens, R prompts at most; T length of a row.
"""

import flax
import jax
import jax.numpy as jnp

from llava_jax.inference.sampling import Logprobs, Sampling, logprobs_of, sample
from llava_jax.models.cache import Chunks, KVCache, empty_cache
from llava_jax.models.llava import LlavaModel

TOKENS_PER_CALL = 8  # enough to hide the dispatch, few enough to stream and to stop on text
POSITIONS_AT_A_TIME = 16  # of prompt logprobs: logits of a whole prompt never exist
NO_TOKEN = -1


@flax.struct.dataclass
class DecodeState:
    """What the rows of a batch carry from one call to the next; updated in place.

    Attributes:
      cache: what the rows have read. A row that ended keeps it, for prompts that begin alike.
      lengths: int32[B], tokens that each row has in the cache.
      tokens: int32[B], each row's latest token, not yet in the cache.
      budget: int32[B], tokens each row may still produce; 0 in a finished row.
      seen: bool[B, V], tokens of the prompt and of the answer.
    """

    cache: KVCache | tuple[KVCache, ...]
    lengths: jax.Array
    tokens: jax.Array
    budget: jax.Array
    seen: jax.Array
    sampling: Sampling

    @classmethod
    def empty(cls, model: LlavaModel, rows: int, size: int, kv_dtype) -> "DecodeState":
        decoder = model.config.decoder
        return cls(
            empty_cache(decoder, rows, size, kv_dtype, model.stacked),
            jnp.zeros(rows, jnp.int32),
            jnp.zeros(rows, jnp.int32),
            jnp.zeros(rows, jnp.int32),
            jnp.zeros((rows, decoder.vocab_size), bool),
            jax.tree.map(jnp.asarray, Sampling.zeros(rows)),
        )


@flax.struct.dataclass
class Prompts:
    """Prompts to be read, each into a row of the state, behind what it shares with other rows.

    Attributes:
      input_ids: int32[Q], of all prompts one after the other, without what is shared.
      feature_ids: int32[Q], the image feature that stands for a token, as its place among the
        F * P of the store; NO_TOKEN where the token is text.
      chunks: where in the rows each token belongs, R chunks. The first of a prompt has its number,
        and copies the prompt into its row.
      last: int32[R], the place of each prompt's last token among the Q.
      lengths: int32[R], tokens of the whole prompt.
      whole: int32[R, C], all text tokens of the prompt, NO_TOKEN elsewhere.
      budget: int32[R], tokens wanted.
    """

    input_ids: jax.Array
    feature_ids: jax.Array
    chunks: Chunks
    last: jax.Array
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

    def read(model: LlavaModel):
        features = store.reshape(-1, store.shape[-1])  # [F * P, D]
        embeddings = model.embed(prompts.input_ids, features, prompts.feature_ids)
        return model.decoder.read(embeddings, state.cache, prompts.chunks)

    hidden, cache = model.apply({"params": params}, method=read)
    # Only the last position needs logits: [R, V] instead of [Q, V].
    last = hidden[prompts.last]
    logits = model.apply({"params": params}, last, method=LlavaModel.attend)
    seen = _mark(jnp.zeros(logits.shape, bool), prompts.whole)
    tokens = sample(logits, prompts.sampling, prompts.lengths, seen)
    put = lambda old, new: old.at[prompts.chunks.copies].set(new, mode="drop")
    state = DecodeState(
        cache,
        put(state.lengths, prompts.lengths),
        put(state.tokens, tokens),
        put(state.budget, _spend(prompts.budget, tokens, prompts.sampling)),
        put(state.seen, _mark(seen, tokens[:, None])),
        jax.tree.map(put, state.sampling, prompts.sampling),
    )
    tokens = jnp.where(prompts.budget > 0, tokens, NO_TOKEN)
    return tokens, _logprobs(logits, tokens, prompts.sampling), state


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
    state = state.replace(budget=jnp.where(running, state.budget, 0))
    rows = len(state.tokens)
    tokens = jnp.full((rows, TOKENS_PER_CALL), NO_TOKEN, jnp.int32)

    def unfinished(carry):
        step, state, *_ = carry
        return (step < TOKENS_PER_CALL) & (jnp.sum(state.budget > 0) >= fewest)

    def one_token(carry):
        step, state, tokens, logprobs = carry
        active = state.budget > 0
        state, new = _decode_one(model, params, state, window)
        column = jnp.where(active, state.tokens, NO_TOKEN)
        logprobs = jax.tree.map(lambda all, one: all.at[:, step].set(one), logprobs, new)
        return step + 1, state, tokens.at[:, step].set(column), logprobs

    carry = (0, state, tokens, Logprobs.zeros(rows, TOKENS_PER_CALL))
    _, state, tokens, logprobs = jax.lax.while_loop(unfinished, one_token, carry)
    return tokens, logprobs, state


def _decode_one(model: LlavaModel, params: dict, state: DecodeState, window: int):
    """Reads each row's latest token and chooses the next; a finished row's cache stays as it is."""
    active = state.budget > 0
    chunks = Chunks.one_each(state.lengths, active, window)

    def read(model: LlavaModel):
        # By `embed`: a chosen token is text, even one that in a prompt stands for an image.
        return model.decoder.read(model.decoder.embed(state.tokens), state.cache, chunks)

    hidden, cache = model.apply({"params": params}, method=read)
    lengths = state.lengths + active
    logits = model.apply({"params": params}, hidden, method=LlavaModel.attend)
    tokens = sample(logits, state.sampling, lengths, state.seen)
    state = state.replace(
        cache=cache,
        lengths=lengths,
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
    model: LlavaModel,
    params: dict,
    store: jax.Array,
    input_ids: jax.Array,
    feature_ids: jax.Array,
    targets: jax.Array,
) -> Logprobs:
    """[1, T] of targets int32[1, T], the token behind each of a prompt int32[1, T].

    A prompt may be padded on the right; `feature_ids` as in `Prompts`.
    """

    def read(model: LlavaModel):
        positions = jnp.arange(input_ids.shape[1])[None]
        features = store.reshape(1, -1, store.shape[-1])  # [1, F * P, D]
        embeddings = model.embed(input_ids, features, feature_ids)
        return model.decoder(embeddings, positions, jnp.ones_like(positions))

    hidden = model.apply({"params": params}, method=read)
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
    feature_ids: jax.Array,
    attention_mask: jax.Array,
) -> jax.Array:
    """Float32 logits [B, T, V] of whole sequences, padded on either side (mask int[B, T])."""
    positions = jnp.maximum(jnp.cumsum(attention_mask, axis=1) - 1, 0)
    inputs = (input_ids, images, feature_ids, None, positions, attention_mask)
    hidden = model.apply({"params": params}, *inputs)
    return model.apply({"params": params}, hidden, method=LlavaModel.attend)
