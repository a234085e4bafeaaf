"""The device side of generation: encode, prefill and decode as pure functions.

B rows of the state, C slots of a row that are looked at, F slots of the feature store, P features
of a tile, D model size, V vocabulary; of one prefill: Q tokens, R chunks; T length of a row.
"""

import flax
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llava_jax.inference.contrast import Contrast, choose
from llava_jax.inference.sampling import Logprobs, Sampling
from llava_jax.models.cache import NO_PAGE, PAGE, Chunks, KVCache, empty_cache
from llava_jax.models.images import ImageSpec
from llava_jax.models.llava import LlavaModel

TOKENS_PER_CALL = 8  # enough to hide the dispatch, few enough to stream and to stop on text
NO_TOKEN = -1
TILE_SLOTS = 64  # of the feature store, if pictures are small: tiles that are kept

# Mesh axes of the state: pages and rows over fsdp, kv heads over tensor.
_KEYS = (None, "fsdp", "tensor", None, None)  # [L, pages, K, PAGE, H]
_SCALES = (None, None, "fsdp", "tensor", None)  # [2, L, pages, K, PAGE]
_ROWS = ("fsdp",)  # [B, ...]


@flax.struct.dataclass
class DecodeState:
    """The rows of a batch, from one call to the next; updated in place.

    Attributes:
      cache: keys and values of all rows. The host knows which pages are a row's.
      lengths: int32[B], number of tokens that each row has in the cache.
      tokens: int32[B], the latest token of each row, not yet in the cache.
      budget: int32[B], number of tokens that each row may still produce; 0 in a finished row.
      seen: bool[B, V], tokens of the prompt and of the answer.
      sampling: the settings of each row.
      history: int32[B, size], with prompt look-up: the token at each position of a row, the latest
        included, and ids below 0 at pictures'. What is behind the latest means nothing.
    """

    cache: KVCache | tuple[KVCache, ...]
    lengths: jax.Array
    tokens: jax.Array
    budget: jax.Array
    seen: jax.Array
    sampling: Sampling
    history: jax.Array | None = None

    @classmethod
    def empty(
        cls, model: LlavaModel, rows: int, pages: int, kv_dtype, history: int = 0
    ) -> "DecodeState":
        """Rows that hold nothing, a cache of so many pages, and of each row so long a history."""
        decoder = model.config.decoder
        return cls(
            empty_cache(decoder, pages, kv_dtype, model.stacked),
            jnp.zeros(rows, jnp.int32),
            jnp.zeros(rows, jnp.int32),
            jnp.zeros(rows, jnp.int32),
            jnp.zeros((rows, decoder.vocab_size), bool),
            jax.tree.map(jnp.asarray, Sampling.zeros(rows)),
            jnp.full((rows, history), NO_TOKEN) if history else None,
        )


def shard_state(state: DecodeState, mesh: Mesh) -> DecodeState:
    """Shards a state, or keeps it sharded inside a compiled function.

    Axes that do not divide evenly are replicated.
    """

    def spread(leaf, axes):
        spec = [
            axis if axis and size % mesh.shape[axis] == 0 else None
            for axis, size in zip(axes, leaf.shape, strict=False)
        ]
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, PartitionSpec(*spec)))

    def spread_cache(cache: KVCache) -> KVCache:
        scales = None if cache.scales is None else spread(cache.scales, _SCALES)
        return KVCache(spread(cache.keys, _KEYS), spread(cache.values, _KEYS), scales)

    placed = jax.tree.map(lambda leaf: spread(leaf, _ROWS), state.replace(cache=None))
    is_cache = lambda node: isinstance(node, KVCache)
    return placed.replace(cache=jax.tree.map(spread_cache, state.cache, is_leaf=is_cache))


@flax.struct.dataclass
class Prompts:
    """Prompts to be read into rows of the state, without the beginnings that pages hold already.

    Arrays over R have the values of a prompt at its first chunk; at other chunks `rows` is past the
    end and drops them. Example: `a#b`, where # is feature 3 of tile slot 2 (P = 4), for row 2 of
    B = 4, and `ac` for row 0, whose `a` was read before; chunks of two tokens:

        input_ids    a -200 b c         Q = 4
        feature_ids  -1 11 -1 -1
        rows         2 4 0              R = 3: chunk 1 is the end of the first prompt
        last         2 0 3
        lengths      3 0 2
        whole        [a . b] [. . .] [a c .]     C = 3; a dot is NO_TOKEN, or nothing

    Attributes:
      input_ids: int32[Q], of all prompts one after another.
      feature_ids: int32[Q], the image feature at each token, as an index into the F * P of the
        store; TEXT for text, NEWLINE for the learnt newline. Of models whose tokens mix features
        int32[Q, TAPS], see `taps.Taps`.
      feature_weights: float32[Q, TAPS] of the mixed features; None for other models.
      chunks: where in the cache each token belongs.
      rows: int32[R], row of the state that each prompt is answered in.
      last: int32[R], index of the prompt's last token among the Q.
      lengths: int32[R], tokens of the whole prompt.
      whole: int32[R, C], all tokens of the prompt, of which ids below 0 count as none.
      budget: int32[R], number of tokens wanted.
      sampling: the settings of each prompt.
      contrast: which prompts are pairs, with chunks for rows; None if none are.
    """

    input_ids: jax.Array
    feature_ids: jax.Array
    feature_weights: jax.Array | None
    chunks: Chunks
    rows: jax.Array
    last: jax.Array
    lengths: jax.Array
    whole: jax.Array
    budget: jax.Array
    sampling: Sampling
    contrast: Contrast | None = None


def encode(
    model: LlavaModel, params: dict, store: jax.Array, images: jax.Array, slots: jax.Array
) -> jax.Array:
    """The store [F, P, D] with the features of tiles uint8[n, S, S, 3] at `slots` int32[n].

    A slot past the end drops a tile that only fills up the shape.
    """
    features = model.apply({"params": params}, images, method=LlavaModel.encode_images)
    return store.at[slots].set(features.astype(store.dtype), mode="drop")


def prefill(
    model: LlavaModel, params: dict, state: DecodeState, store: jax.Array, prompts: Prompts
) -> tuple[jax.Array, Logprobs, DecodeState]:
    """Reads prompts into rows of the state and chooses the first token of each answer.

    Returns:
      The first tokens int32[R] (NO_TOKEN if the budget is 0), their logprobs, and the state.
    """

    def read(model: LlavaModel):
        features = store.reshape(-1, store.shape[-1])  # [F * P, D]
        ids, weights = prompts.feature_ids, prompts.feature_weights
        embeddings = model.embed(prompts.input_ids, features, ids, feature_weights=weights)
        return model.decoder.read(embeddings, state.cache, prompts.chunks)

    hidden, cache = model.apply({"params": params}, method=read)
    # Only the last position needs logits: [R, V] instead of [Q, V].
    last = hidden[prompts.last]
    logits = model.apply({"params": params}, last, method=LlavaModel.attend)
    seen = _mark(jnp.zeros(logits.shape, bool), prompts.whole)
    settings = prompts.sampling, prompts.lengths, seen, prompts.contrast
    tokens, logprobs = choose(logits, *settings)
    put = lambda old, new: old.at[prompts.rows].set(new, mode="drop")
    state = DecodeState(
        cache,
        put(state.lengths, prompts.lengths),
        put(state.tokens, tokens),
        put(state.budget, _spend(prompts.budget, tokens, prompts.sampling)),
        put(state.seen, _mark(seen, tokens[:, None])),
        jax.tree.map(put, state.sampling, prompts.sampling),
        _history(model, state.history, prompts, tokens),
    )
    tokens = jnp.where(prompts.budget > 0, tokens, NO_TOKEN)
    return tokens, logprobs, state


def decode(
    model: LlavaModel,
    params: dict,
    state: DecodeState,
    running: jax.Array,
    fewest: jax.Array,
    tables: jax.Array,
    contrast: Contrast | None = None,
) -> tuple[jax.Array, Logprobs, DecodeState]:
    """Up to TOKENS_PER_CALL more tokens of every unfinished row.

    Args:
      running: bool[B], rows that should go on.
      fewest: int32, ends early when fewer rows than this are left, so that others can start.
      tables: int32[B, C / PAGE], the pages of each row, with room for what this call adds.
      contrast: which rows are pairs; None if none are.

    Returns:
      Tokens int32[B, TOKENS_PER_CALL], NO_TOKEN after a row's end, their logprobs, and the state.
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
        state, new = _decode_one(model, params, state, tables, contrast)
        column = jnp.where(active, state.tokens, NO_TOKEN)
        logprobs = jax.tree.map(lambda all, one: all.at[:, step].set(one), logprobs, new)
        return step + 1, state, tokens.at[:, step].set(column), logprobs

    carry = (0, state, tokens, Logprobs.zeros(rows, TOKENS_PER_CALL))
    _, state, tokens, logprobs = jax.lax.while_loop(unfinished, one_token, carry)
    return tokens, logprobs, state


def _history(model: LlavaModel, history: jax.Array | None, prompts: Prompts, tokens: jax.Array):
    """The history with the prompts and the first tokens int32[R] of their answers."""
    if history is None:
        return None
    config, ids = model.config, prompts.whole
    for picture in (config.image_token_id, config.video_token_id):
        ids = ids if picture is None else jnp.where(ids == picture, NO_TOKEN, ids)
    rows = prompts.rows
    history = history.at[rows, : ids.shape[1]].set(ids, mode="drop")
    return history.at[rows, prompts.lengths].set(tokens, mode="drop")


def _decode_one(model: LlavaModel, params: dict, state: DecodeState, tables, contrast):
    """Reads each row's latest token and chooses the next; the cache of a finished row is kept."""
    active = state.budget > 0
    logits, state = read_on(model, params, state, state.tokens[:, None], active[:, None], tables)
    return advance(state, logits[:, 0], active, contrast)


def read_on(
    model: LlavaModel,
    params: dict,
    state: DecodeState,
    tokens: jax.Array,
    wanted: jax.Array,
    tables: jax.Array,
) -> tuple[jax.Array, DecodeState]:
    """Reads T tokens into each row, behind those that it has.

    Args:
      tokens: int32[B, T].
      wanted: bool[B, T], those that are read; the cache keeps what it holds at the others.
      tables: as in `decode`.

    Returns:
      Their logits float32[B, T, V], and the state with them in its cache.
    """
    (count, length), every = tokens.shape, jnp.arange(tokens.size)
    # What is not read looks at nothing far, so that a row that has ended costs no time.
    slots = jnp.where(wanted, state.lengths[:, None] + jnp.arange(length), 0)
    pages = jnp.where(wanted, jnp.take_along_axis(tables, slots // PAGE, axis=1), NO_PAGE)
    # Chunk r is row r.
    chunks = Chunks(slots.ravel(), pages.ravel(), every.reshape(tokens.shape), every, tables)

    def read(model: LlavaModel):
        # A chosen token is text, even the id that stands for an image in prompts.
        return model.decoder.read(model.decoder.embed(tokens.ravel()), state.cache, chunks)

    hidden, cache = model.apply({"params": params}, method=read)
    logits = model.apply({"params": params}, hidden, method=LlavaModel.attend)
    return logits.reshape(count, length, -1), state.replace(cache=cache)


def advance(
    state: DecodeState, logits: jax.Array, active: jax.Array, contrast: Contrast | None
) -> tuple[DecodeState, Logprobs]:
    """Chooses the token after each row's latest, which the cache holds now.

    Args:
      logits: float32[B, V], of the latest tokens.
      active: bool[B]; the others' lengths stay, and their token means nothing.
    """
    lengths = state.lengths + active
    tokens, logprobs = choose(logits, state.sampling, lengths, state.seen, contrast)
    state = state.replace(
        lengths=lengths,
        tokens=tokens,
        budget=_spend(state.budget, tokens, state.sampling),
        seen=_mark(state.seen, tokens[:, None]),
    )
    return state, logprobs


def _spend(budget, tokens, sampling: Sampling):
    """The budget after one more token: 0 after a token that ends the answer."""
    ended = jnp.any(tokens[:, None] == sampling.stop_ids, axis=1)
    return jnp.where(ended, 0, jnp.maximum(budget - 1, 0))


def _mark(seen, tokens):
    """bool[B, V] with tokens int32[B, n] marked; ids below 0 are ignored."""
    places = jnp.where(tokens >= 0, tokens, seen.shape[1])
    return seen.at[jnp.arange(len(seen))[:, None], places].set(True, mode="drop")


def tile_slots(image: ImageSpec) -> int:
    """Slots of the feature store: room for the largest picture and a video, and some more."""
    grids = image.tiling.grids if image.tiling else ()
    largest = 1 + max((columns * rows for columns, rows in grids), default=0)
    return max(TILE_SLOTS, largest + (image.video.frames if image.video else 0))
