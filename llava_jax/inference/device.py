"""A model on its devices: compiled functions, and the arrays that pass from call to call.

B rows, T length, S side of a tile, K tiles of a row, V vocabulary.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llava_jax.inference import decoding
from llava_jax.inference.decoding import NO_TOKEN, DecodeState
from llava_jax.inference.jobs import Job
from llava_jax.inference.placement import place_state
from llava_jax.inference.prefill import (
    PrefillShape,
    count_bucket,
    length_bucket,
    pack,
    tile_bucket,
)
from llava_jax.inference.sampling import Logprobs
from llava_jax.models.decoder import are_stacked
from llava_jax.models.llava import LlavaConfig, LlavaModel
from llava_jax.models.precision import compute_precision
from llava_jax.parallel.sharding import replicated


class Device:
    """Runs a model's functions, which are compiled for each shape at its first use.

    Args:
      dtype: a key of `PRECISIONS`, or auto; the attribute is the dtype of the activations.
      kv_dtype: of the cache: None for that of the activations, or int8.
      mesh: of the devices that `params` are spread over; None for one device.
      tile_slots: tiles whose features are kept.

    Attributes:
      compilations: functions compiled so far.
      state, store: the rows of the batch, and the features of tiles; None before first use.
      rows, size: of the state; 0 before.
    """

    def __init__(
        self,
        config: LlavaConfig,
        params: dict,
        dtype: str,
        kv_dtype: str | None,
        mesh: Mesh | None,
        tile_slots: int,
    ):
        self.config, self.tile_slots = config, tile_slots
        self.compilations = 0
        dtype, self._precision = compute_precision(dtype)
        self.dtype = dtype.name
        stacked = not params or are_stacked(params["decoder"])  # training gives them later
        self._model = LlavaModel(config, dtype, stacked=stacked)
        self.kv_dtype = jnp.dtype(kv_dtype or dtype)
        self._mesh = mesh
        self.params = params  # an argument of every call: a closure would compile it in
        self._new_state = jax.jit(self._empty_state, static_argnums=(0, 1))  # never whole anywhere
        self._encode = self._compile(decoding.encode, donate_argnums=1)
        self._prefill = self._compile(decoding.prefill, donate_argnums=1)
        self._decode = self._compile(decoding.decode, donate_argnums=1, static_argnames="window")
        self._prompt_logprobs = self._compile(decoding.prompt_logprobs)
        self._all_logits = self._compile(decoding.all_logits)
        self.forget()

    def forget(self) -> None:
        """Drops everything that was computed from pictures and prompts."""
        self.state: DecodeState | None = None
        self.store: jax.Array | None = None
        self.rows = self.size = 0

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
        return state if self._mesh is None else place_state(state, self._mesh)

    def reserve(self, rows: int, size: int) -> None:
        """Makes the state anew, with `size` slots a row."""
        self.state = None  # its memory must be free before the new one is made
        self.state = self._new_state(rows, size)
        self.rows, self.size = rows, size

    def encode(self, tiles: dict[int, np.ndarray]) -> None:
        """Fills slots of the feature store with the features of uint8[S, S, 3]."""
        store = self.store
        if store is None:
            shape = (self.tile_slots, self.config.tokens_per_tile, self.config.decoder.hidden_size)
            device = self._mesh and replicated(self._mesh)
            store = jnp.zeros(shape, self._model.dtype, device=device)
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

    def prefill(self, jobs: Sequence[Job], shape: PrefillShape) -> tuple[jax.Array, Logprobs]:
        """Reads prompts into their rows; first tokens and their log probabilities."""
        prompts = pack(jobs, shape, self.rows)
        *outputs, self.state = self._prefill(self.params, self.state, self.store, prompts)
        return outputs

    def decode(self, running: np.ndarray, fewest: int, window: int) -> tuple[jax.Array, Logprobs]:
        """More tokens of the running rows, and their log probabilities; see `decoding.decode`."""
        *outputs, self.state = self._decode(
            self.params, self.state, running, np.int32(fewest), window=window
        )
        return outputs

    def prompt_logprobs(self, job: Job) -> Logprobs:
        """Log probabilities [1, T] of the tokens that follow each of a prompt's."""
        pieces = -(-length_bucket(job.length) // decoding.POSITIONS_AT_A_TIME)
        padding = (0, pieces * decoding.POSITIONS_AT_A_TIME - job.length)
        ids = np.pad(job.request.input_ids, padding)[None]
        features = np.pad(job.feature_ids, padding, constant_values=NO_TOKEN)[None]
        targets = np.roll(ids, -1, axis=1)
        return self._prompt_logprobs(self.params, self.store, ids, features, targets)

    def logits(
        self,
        input_ids: np.ndarray,
        tiles: Sequence[np.ndarray],
        feature_ids: np.ndarray,
        attention_mask: np.ndarray,
    ) -> jax.Array:
        """Float32 logits [B, T, V].

        Args:
          input_ids: int[B, T], padded on either side.
          tiles: per row, float32[n, S, S, 3] (normalised) or uint8.
          feature_ids: int[B, T], the feature of the row's tiles that stands at each position;
            NO_TOKEN for text.
          attention_mask: int[B, T], 1 for real tokens.
        """
        (rows, length), padded = input_ids.shape, length_bucket(input_ids.shape[1])
        padding = ((0, count_bucket(rows) - rows), (0, padded - length))
        pad = lambda x, value=0: np.pad(x.astype(np.int32), padding, constant_values=value)
        logits = self._all_logits(
            self.params,
            pad(input_ids),
            _stack_tiles(tiles, rows + padding[0][1]),
            pad(feature_ids, NO_TOKEN),
            pad(attention_mask),
        )
        return logits[:rows, :length]


def _stack_tiles(tiles: Sequence[np.ndarray], rows: int) -> np.ndarray | None:
    """Each row's tiles with zeros behind them, [rows, K, S, S, 3]; None if no row has one."""
    slots = count_bucket(max(len(row) for row in tiles))
    if not slots:
        return None
    first = next(row[0] for row in tiles if len(row))
    batch = np.zeros((rows, slots, *first.shape), first.dtype)
    for row, of_row in enumerate(tiles):
        batch[row, : len(of_row)] = of_row if len(of_row) else 0
    return batch
