"""`Device`: a model's compiled functions, and the state that they keep on the device.

S side of a tile, B rows, T length of a row, V vocabulary.
"""

import functools
import itertools
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from llava_jax.inference.contrast import Contrast
from llava_jax.inference.decoding import (
    DecodeState,
    Prompts,
    decode,
    encode,
    prefill,
    shard_state,
    tile_slots,
)
from llava_jax.inference.lookup import Drafts, check_lookup, decode_drafts
from llava_jax.inference.prefill import (
    PrefillShape,
    count_bucket,
    length_bucket,
    prefill_shapes,
    windows_of,
)
from llava_jax.inference.sampling import Logprobs
from llava_jax.inference.scoring import all_logits, prompt_logprobs, trace
from llava_jax.models.cache import PAGE
from llava_jax.models.decoder import are_stacked
from llava_jax.models.llava import LlavaConfig, LlavaModel
from llava_jax.models.precision import compute_precision
from llava_jax.models.taps import TEXT
from llava_jax.parallel.sharding import replicated

TILES = (1, 4, 16, 64)  # encoded at once


def tile_bucket(waiting: int) -> int:
    """How many tiles the next call encodes: the most of TILES with 1/8 or one to spare."""
    return max(count for count in TILES if count - waiting <= max(count // 8, 1))


def all_calls(
    batch_size: int, size: int, few: bool, contrast: bool = False, traces: bool = False
) -> list[tuple[str, int | PrefillShape]]:
    """(function, its shape) of every call that requests can need; arguments as in `warm_up`.

    The shape is a number of tiles for `encode`, a window for `decode`, a length for `trace`. With
    `contrast` calls with pairs have functions of their own.
    """
    windows, prompts = windows_of(size, few), prefill_shapes(batch_size, size, few)
    shapes = {"encode": TILES, "decode": windows, "prefill": prompts}
    if contrast:
        shapes |= {"decode pairs": windows, "prefill pairs": prompts}
    if traces:
        shapes["trace"] = sorted({length_bucket(n, few) for n in range(1, size + 1)})
    return [(function, shape) for function, some in shapes.items() for shape in some]


def compile_all(lowered: Iterable[jax.stages.Lowered], report: Callable[[int], None]) -> None:
    """Compiles programs, or reads what was compiled before; that needs no Python.

    So the next ones are traced meanwhile. One at a time, as a GPU's compiler measures kernels.

    Args:
      report: called with the number of those that are compiled, after each.
    """
    number = itertools.count(1)

    def compile_one(program: jax.stages.Lowered) -> None:
        program.compile()
        report(next(number))

    with ThreadPoolExecutor(1, "compiler") as compiler:
        list(compiler.map(compile_one, lowered))  # raises what any of them raised


class Device:
    """Runs a model's functions, which are compiled for each shape at its first use.

    Args:
      dtype: a key of `PRECISIONS`, or auto; the attribute is the dtype of the activations.
      kv_dtype: of the cache: None for that of the activations, or int8.
      mesh: of the devices that `params` are spread over; None for one device.
      lookup: tokens that a pass of `decode` guesses of each row, see lookup.py; 0 is off.

    Attributes:
      compilations: functions compiled so far.
      state, store: the rows of the batch, and the features of tiles; None before first use.
      rows, pages: of the state; 0 before.
      size: the most tokens of a row.
      tile_slots: of the store.
    """

    def __init__(
        self,
        config: LlavaConfig,
        params: dict,
        dtype: str,
        kv_dtype: str | None,
        mesh: Mesh | None,
        lookup: int = 0,
    ):
        check_lookup(lookup)
        self.config, self.lookup = config, lookup
        self.tile_slots = tile_slots(config.image)
        self.compilations = 0
        dtype, self._precision = compute_precision(dtype)
        self.dtype = dtype.name
        stacked = not params or are_stacked(params["decoder"])  # training gives them later
        self._model = LlavaModel(config, dtype, stacked=stacked)
        self.kv_dtype = jnp.dtype(kv_dtype or dtype)
        self._mesh = mesh
        self.params = params  # an argument of every call: a closure would compile it in
        # On a mesh it is never whole anywhere.
        self._new_state = jax.jit(self._empty_state, static_argnums=(0, 1, 2))
        # The store stays whole on each device: another placing would compile the next call anew.
        placed = {"out_shardings": replicated(mesh)} if mesh else {}
        self._encode = self._compile(encode, donate_argnums=1, **placed)
        self._prefill = self._compile(prefill, donate_argnums=1)
        decode_ = functools.partial(decode_drafts, count=lookup) if lookup else decode
        self._decode = self._compile(decode_, donate_argnums=1)
        self._prompt_logprobs = self._compile(prompt_logprobs)
        self._trace = self._compile(trace)
        self._all_logits = self._compile(all_logits)
        self.forget()

    def forget(self) -> None:
        """Drops everything that was computed from pictures and prompts."""
        self.state: DecodeState | None = None
        self.store: jax.Array | None = None
        self.rows = self.size = self.pages = 0

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

    def _empty_state(self, rows: int, pages: int, size: int) -> DecodeState:
        history = size if self.lookup else 0
        return self._place(DecodeState.empty(self._model, rows, pages, self.kv_dtype, history))

    def _place(self, state: DecodeState) -> DecodeState:
        return state if self._mesh is None else shard_state(state, self._mesh)

    def reserve(self, rows: int, pages: int, size: int) -> None:
        """Makes the state anew, for rows of at most `size` tokens that share so many pages."""
        self.state = None  # its memory must be free before the new one is made
        self.state = self._new_state(rows, pages, size)
        if self._mesh is None:
            self.state = jax.device_put(self.state, self._home)
        self.rows, self.pages, self.size = rows, pages, size

    def widen(self, size: int) -> bool:
        """Lets rows have so many tokens; False if the state must be made anew for that."""
        if size > self.size and self.lookup:  # each row has a history of that size
            return False
        self.size = max(self.size, size)
        return True

    @property
    def _home(self) -> jax.sharding.Sharding | None:
        """The place of new arrays, as of those that calls return; None if JAX may choose it.

        Calls with parameters that were put on a device return arrays that stay there. What is
        compiled for arrays that JAX may move is compiled again for those.
        """
        if self._mesh:
            return replicated(self._mesh)
        leaves = jax.tree.leaves(self.params)
        places = {leaf.sharding for leaf in leaves if getattr(leaf, "committed", False)}
        return places.pop() if len(places) == 1 else None

    def _empty_store(self) -> jax.Array:
        return jnp.zeros(self._store_shape, self._model.dtype, device=self._home)

    def lower_encode(self, count: int) -> jax.stages.Lowered:
        """What `encode` runs for `count` tiles at once."""
        if self.store is None:
            self.store = self._empty_store()
        side = self.config.image.size
        pixels, slots = np.zeros((count, side, side, 3), np.uint8), np.zeros(count, np.int32)
        return self.lower("encode", self.store, pixels, slots)

    def lower_prefill(self, prompts: Prompts) -> jax.stages.Lowered:
        """What `prefill` runs for prompts of these shapes."""
        return self.lower("prefill", self.state, self.store, prompts)

    def lower_decode(self, window: int, pairs: bool = False) -> jax.stages.Lowered:
        """What `decode` runs for a window, with pairs of rows or without."""
        running, fewest = np.zeros(self.rows, bool), np.int32(1)
        tables = np.zeros((self.rows, window // PAGE), np.int32)
        contrast = {"contrast": Contrast.none(self.rows)} if pairs else {}
        return self.lower("decode", self.state, running, fewest, tables, **contrast)

    def lower_trace(self, length: int) -> jax.stages.Lowered:
        """What `trace` runs for prompts of a padded length."""
        if self.store is None:
            self.store = self._empty_store()
        taps = self.config.image.taps
        ids = np.zeros((1, length), np.int32)
        mixed = np.zeros((1, length, taps), np.int32)
        features = (ids, None) if taps == 1 else (mixed, mixed.astype(np.float32))
        return self.lower("trace", self.store, ids, *features, np.int32(0))

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

    def decode(
        self,
        running: np.ndarray,
        fewest: int,
        tables: np.ndarray,
        contrast: Contrast | None = None,
    ) -> tuple[jax.Array, Logprobs, Drafts | None]:
        """More tokens of the running rows and their log probabilities; see `decoding.decode`.

        With `lookup` also what became of the guesses.
        """
        pairs = {} if contrast is None else {"contrast": contrast}
        *outputs, self.state = self._decode(
            self.params, self.state, running, np.int32(fewest), tables, **pairs
        )
        return outputs if self.lookup else (*outputs, None)

    def prompt_logprobs(self, *inputs) -> Logprobs:
        """Log probabilities of a prompt's tokens; arguments as in `scoring.prompt_logprobs`."""
        return self._prompt_logprobs(self.params, self.store, *inputs)

    def trace(self, *inputs) -> tuple[jax.Array, jax.Array]:
        """Log probabilities and attention of an answer's tokens; see `scoring.trace`."""
        return self._trace(self.params, self.store, *inputs)

    def logits(
        self,
        input_ids: np.ndarray,
        tiles: np.ndarray | None,
        feature_ids: np.ndarray,
        attention_mask: np.ndarray,
        feature_weights: np.ndarray | None = None,
    ) -> jax.Array:
        """Float32 logits [B, T, V] of whole sequences.

        Args:
          input_ids: int[B, T], padded on either side.
          tiles: of all rows, float32[n, S, S, 3] (normalised) or uint8; None if there are none.
          feature_ids: int[B, T], or [B, T, TAPS], the feature of `tiles` at each position; TEXT for
            text, NEWLINE for the learnt newline.
          attention_mask: int[B, T], 1 for real tokens.
          feature_weights: float32[B, T, TAPS], only with taps.
        """
        (rows, length), padded = input_ids.shape, length_bucket(input_ids.shape[1])
        padding = ((0, count_bucket(rows) - rows), (0, padded - length), (0, 0))
        pad = lambda x, value=0: np.pad(x, padding[: x.ndim], constant_values=value)
        ids, features, mask = (x.astype(np.int32) for x in (input_ids, feature_ids, attention_mask))
        weights = None if feature_weights is None else pad(feature_weights)
        inputs = pad(ids), _fill_up(tiles), pad(features, TEXT), weights, pad(mask)
        return self._all_logits(self.params, *inputs)[:rows, :length]

    def abstract_state(self, rows: int, pages: int, size: int) -> DecodeState:
        """Shapes and shardings of the state that `reserve` makes, on devices not attached too."""
        made = self._new_state.lower(rows, pages, size)
        shape = lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
        return jax.tree.map(shape, made.out_info, made.compile().output_shardings)

    def abstract_store(self, place: NamedSharding) -> jax.ShapeDtypeStruct:
        """Shape of the feature store."""
        return jax.ShapeDtypeStruct(self._store_shape, self._model.dtype, sharding=place)

    def lower(self, function: str, *shapes, **options) -> jax.stages.Lowered:
        """A function, by its name here, for the shapes of its arguments after the parameters."""
        return getattr(self, f"_{function}").lower(self.params, *shapes, **options)


def _fill_up(tiles: np.ndarray | None) -> np.ndarray | None:
    """Tiles [n, S, S, 3] and zeros, at most a third, behind them; None for none."""
    if tiles is None or not len(tiles):
        return None
    power = count_bucket(len(tiles))
    count = power * 3 // 4 if len(tiles) <= power * 3 // 4 else power
    return np.pad(tiles, [(0, count - len(tiles)), (0, 0), (0, 0), (0, 0)])
