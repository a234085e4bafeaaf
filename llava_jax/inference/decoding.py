"""The device side of generation: prefill and decode as pure functions, and `Device`, their state.

B rows of the state, C cache slots that are looked at, F slots of the feature store, P features of a
tile, D model size, V vocabulary; of one prefill: Q tokens, R chunks; T length of a row.
"""

import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llava_jax.inference.sampling import Logprobs, Sampling, sample, wanted_logprobs
from llava_jax.inference.scoring import all_logits, prompt_logprobs
from llava_jax.models.cache import Chunks, KVCache, empty_cache
from llava_jax.models.decoder import are_stacked
from llava_jax.models.images import ImageSpec
from llava_jax.models.llava import LlavaConfig, LlavaModel
from llava_jax.models.precision import compute_precision
from llava_jax.parallel.sharding import replicated

TOKENS_PER_CALL = 8  # enough to hide the dispatch, few enough to stream and to stop on text
NO_TOKEN = -1
TILE_SLOTS = 64  # of the feature store, if pictures are small: tiles that are kept
TILES = (1, 4, 16, 64)  # encoded at once

# Mesh axes of the state: rows over fsdp, kv heads over tensor.
_KEYS = (None, "fsdp", "tensor", None, None)  # [L, B, K, S, H]
_SCALES = (None, None, "fsdp", "tensor", None)  # [2, L, B, K, S]
_ROWS = ("fsdp",)  # [B, ...]


@flax.struct.dataclass
class DecodeState:
    """The rows of a batch, from one call to the next; updated in place.

    Attributes:
      cache: keys and values. A row that ended keeps them for prompts that begin alike.
      lengths: int32[B], number of tokens that each row has in the cache.
      tokens: int32[B], the latest token of each row, not yet in the cache.
      budget: int32[B], number of tokens that each row may still produce; 0 in a finished row.
      seen: bool[B, V], tokens of the prompt and of the answer.
      sampling: the settings of each row.
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
    """Prompts to be read into rows of the state, without the beginnings that other rows hold.

    Arrays over R have the values of a prompt at its first chunk; at other chunks, the row in
    `chunks.copies` is past the end and drops them. Example: `a#b`, where # is feature 3 of tile
    slot 2 (P = 4), and `ac`, which copies its `a` from the first prompt; chunks of two tokens:

        input_ids    a -200 b c         Q = 4
        feature_ids  -1 11 -1 -1
        last         2 0 3              R = 3: chunk 1 is the end of the first prompt
        lengths      3 0 2
        whole        [a . b] [. . .] [a c .]     C = 3; a dot is NO_TOKEN, or nothing

    Attributes:
      input_ids: int32[Q], of all prompts one after another.
      feature_ids: int32[Q], the image feature at each token, as an index into the F * P of the
        store; TEXT for text, NEWLINE for the learnt newline. Of models whose tokens mix features
        int32[Q, TAPS], see `taps.Taps`.
      feature_weights: float32[Q, TAPS] of the mixed features; None for other models.
      chunks: where in the rows each token belongs. The first chunk of a prompt copies all of it
        into its row.
      last: int32[R], index of the prompt's last token among the Q.
      lengths: int32[R], tokens of the whole prompt.
      whole: int32[R, C], all tokens of the prompt, of which ids below 0 count as none.
      budget: int32[R], number of tokens wanted.
      sampling: the settings of each prompt.
    """

    input_ids: jax.Array
    feature_ids: jax.Array
    feature_weights: jax.Array | None
    chunks: Chunks
    last: jax.Array
    lengths: jax.Array
    whole: jax.Array
    budget: jax.Array
    sampling: Sampling


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
    tokens = sample(logits, prompts.sampling, prompts.lengths, seen)
    logprobs = wanted_logprobs(logits, tokens, prompts.sampling)
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
    return tokens, logprobs, state


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
      running: bool[B], rows that should go on.
      fewest: int32, ends early when fewer rows than this are left, so that others can start.
      window: cache slots to look at; no running row may outgrow them in this call.

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
        state, new = _decode_one(model, params, state, window)
        column = jnp.where(active, state.tokens, NO_TOKEN)
        logprobs = jax.tree.map(lambda all, one: all.at[:, step].set(one), logprobs, new)
        return step + 1, state, tokens.at[:, step].set(column), logprobs

    carry = (0, state, tokens, Logprobs.zeros(rows, TOKENS_PER_CALL))
    _, state, tokens, logprobs = jax.lax.while_loop(unfinished, one_token, carry)
    return tokens, logprobs, state


def _decode_one(model: LlavaModel, params: dict, state: DecodeState, window: int):
    """Reads each row's latest token and chooses the next; the cache of a finished row is kept."""
    active, every = state.budget > 0, jnp.arange(len(state.tokens))
    # One token in each row: chunk r is row r. Rows that are not active keep what they hold.
    rows = jnp.where(active, every, every.size)
    chunks = Chunks(rows, state.lengths, every[:, None], every, None, None, window)

    def read(model: LlavaModel):
        # A chosen token is text, even the id that stands for an image in prompts.
        return model.decoder.read(model.decoder.embed(state.tokens), state.cache, chunks)

    hidden, cache = model.apply({"params": params}, method=read)
    lengths = state.lengths + active
    logits = model.apply({"params": params}, hidden, method=LlavaModel.attend)
    tokens = sample(logits, state.sampling, lengths, state.seen)
    logprobs = wanted_logprobs(logits, tokens, state.sampling)
    state = state.replace(
        cache=cache,
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


def tile_bucket(waiting: int) -> int:
    """How many tiles the next call encodes: the most of TILES that are filled to 3/4."""
    return max(count for count in TILES if count == 1 or 4 * waiting >= 3 * count)


class Device:
    """Runs a model's functions, which are compiled for each shape at its first use.

    Args:
      dtype: a key of `PRECISIONS`, or auto; the attribute is the dtype of the activations.
      kv_dtype: of the cache: None for that of the activations, or int8.
      mesh: of the devices that `params` are spread over; None for one device.

    Attributes:
      compilations: functions compiled so far.
      state, store: the rows of the batch, and the features of tiles; None before first use.
      rows, size: of the state; 0 before.
      tile_slots: of the store.
    """

    def __init__(
        self,
        config: LlavaConfig,
        params: dict,
        dtype: str,
        kv_dtype: str | None,
        mesh: Mesh | None,
    ):
        self.config = config
        self.tile_slots = tile_slots(config.image)
        self.compilations = 0
        dtype, self._precision = compute_precision(dtype)
        self.dtype = dtype.name
        stacked = not params or are_stacked(params["decoder"])  # training gives them later
        self._model = LlavaModel(config, dtype, stacked=stacked)
        self.kv_dtype = jnp.dtype(kv_dtype or dtype)
        self._mesh = mesh
        self.params = params  # an argument of every call: a closure would compile it in
        self._new_state = jax.jit(self._empty_state, static_argnums=(0, 1))  # never whole anywhere
        # The store stays whole on each device: another placing would compile the next call anew.
        placed = {"out_shardings": replicated(mesh)} if mesh else {}
        self._encode = self._compile(encode, donate_argnums=1, **placed)
        self._prefill = self._compile(prefill, donate_argnums=1)
        self._decode = self._compile(decode, donate_argnums=1, static_argnames="window")
        self._prompt_logprobs = self._compile(prompt_logprobs)
        self._all_logits = self._compile(all_logits)
        self.forget()

    def forget(self) -> None:
        """Drops everything that was computed from pictures and prompts."""
        self.state: DecodeState | None = None
        self.store: jax.Array | None = None
        self.rows = self.size = 0

    @property
    def _store_shape(self) -> tuple[int, int, int]:
        return self.tile_slots, self.config.tokens_per_tile, self.config.decoder.hidden_size

    def _compile(self, function, **options):
        @functools.wraps(function)
        def counted(*arguments, **keywords):
            self.compilations += 1  # runs when JAX traces, not when it calls
            with jax.default_matmul_precision(self._precision):
                outputs = function(self._model, *arguments, **keywords)
            # The state must come out with the sharding it went in with, or the next call would
            # compile again.
            is_state = lambda leaf: isinstance(leaf, DecodeState)
            place = lambda leaf: self._place(leaf) if is_state(leaf) else leaf
            return jax.tree.map(place, outputs, is_leaf=is_state)

        return jax.jit(counted, **options)

    def _empty_state(self, rows: int, size: int) -> DecodeState:
        return self._place(DecodeState.empty(self._model, rows, size, self.kv_dtype))

    def _place(self, state: DecodeState) -> DecodeState:
        return state if self._mesh is None else shard_state(state, self._mesh)

    def reserve(self, rows: int, size: int) -> None:
        """Makes the state anew, with `size` slots a row."""
        self.state = None  # its memory must be free before the new one is made
        self.state = self._new_state(rows, size)
        self.rows, self.size = rows, size

    def _empty_store(self) -> jax.Array:
        device = self._mesh and replicated(self._mesh)
        return jnp.zeros(self._store_shape, self._model.dtype, device=device)

    def compile_encode(self, count: int) -> None:
        """Compiles what `encode` runs for `count` tiles at once, without running it."""
        if self.store is None:
            self.store = self._empty_store()
        side = self.config.image.size
        pixels, slots = np.zeros((count, side, side, 3), np.uint8), np.zeros(count, np.int32)
        self._encode.lower(self.params, self.store, pixels, slots).compile()

    def compile_prefill(self, prompts: Prompts) -> None:
        """Compiles what `prefill` runs for prompts of these shapes, without running it."""
        self._prefill.lower(self.params, self.state, self.store, prompts).compile()

    def compile_decode(self, window: int) -> None:
        """Compiles what `decode` runs for a window, without running it."""
        running, fewest = np.zeros(self.rows, bool), np.int32(1)
        self._decode.lower(self.params, self.state, running, fewest, window=window).compile()

    def encode(self, tiles: dict[int, np.ndarray]) -> None:
        """Fills slots of the feature store with the features of uint8[S, S, 3]."""
        store = self._empty_store() if self.store is None else self.store
        waiting = list(tiles.items())
        while waiting:
            count = tile_bucket(len(waiting))
            some, waiting = waiting[:count], waiting[count:]
            pixels = np.zeros((count, *some[0][1].shape), np.uint8)
            slots = np.full(count, self.tile_slots, np.int32)
            for i, (slot, tile) in enumerate(some):
                pixels[i], slots[i] = tile, slot
            store = self._encode(self.params, store, pixels, slots)
        self.store = store

    def prefill(self, prompts: Prompts) -> tuple[jax.Array, Logprobs]:
        """Reads prompts into their rows; first tokens and their log probabilities."""
        *outputs, self.state = self._prefill(self.params, self.state, self.store, prompts)
        return outputs

    def decode(self, running: np.ndarray, fewest: int, window: int) -> tuple[jax.Array, Logprobs]:
        """More tokens of the running rows and their log probabilities; see `decode` above."""
        *outputs, self.state = self._decode(
            self.params, self.state, running, np.int32(fewest), window=window
        )
        return outputs

    def prompt_logprobs(self, *inputs) -> Logprobs:
        """Log probabilities of a prompt's tokens; arguments as in `scoring.prompt_logprobs`."""
        return self._prompt_logprobs(self.params, self.store, *inputs)

    def logits(self, *inputs) -> jax.Array:
        """Float32 logits [B, T, V] of whole sequences; arguments as in `scoring.all_logits`."""
        return self._all_logits(self.params, *inputs)

    def abstract_state(self, rows: int, size: int) -> DecodeState:
        """Shapes and shardings of the state that `reserve` makes, on devices not attached too."""
        made = self._new_state.lower(rows, size)
        shape = lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
        return jax.tree.map(shape, made.out_info, made.compile().output_shardings)

    def abstract_store(self, place: NamedSharding) -> jax.ShapeDtypeStruct:
        """Shape of the feature store."""
        return jax.ShapeDtypeStruct(self._store_shape, self._model.dtype, sharding=place)

    def lower(self, function: str, *shapes, **options) -> jax.stages.Lowered:
        """`encode`, `prefill` or `decode` for the shapes of its arguments after the parameters."""
        functions = {"encode": self._encode, "prefill": self._prefill, "decode": self._decode}
        return functions[function].lower(self.params, *shapes, **options)
