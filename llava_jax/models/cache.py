"""The key-value cache of a decoder, and how tokens are read into its rows.

B rows of the cache, S slots of a row, L layers, K kv heads, H head size; of one call: Q tokens,
R chunks of at most T tokens, C slots that a chunk looks at.
"""

import dataclasses
from typing import TYPE_CHECKING

import flax
import jax
import jax.numpy as jnp
import numpy as np

from llava_jax.models.attention import attention_mask
from llava_jax.models.precision import quantize

if TYPE_CHECKING:  # decoder.py imports this module
    from llava_jax.models.decoder import DecoderConfig


@flax.struct.dataclass
class KVCache:
    """Keys and values of the tokens read so far; slot s of a row holds its position s.

    Attributes:
      keys, values: [L, B, K, S, H]; the slots of a head are adjacent, as attention multiplies them.
      scales: float32[2, L, B, K, S], the factors of int8 keys and of int8 values; None otherwise.
    """

    keys: jax.Array
    values: jax.Array
    scales: jax.Array | None = None


def empty_cache(
    config: "DecoderConfig", rows: int, size: int, dtype, stacked: bool = True
) -> KVCache | tuple[KVCache, ...]:
    """A cache with `size` slots in each of `rows`: one for all layers, or one for each layer.

    Args:
      dtype: of keys and values; int8 adds one scale for each token and head.
      stacked: the decoder's own, see `Decoder.stacked`.
    """
    if not stacked:
        one = dataclasses.replace(config, num_layers=1)
        return tuple(empty_cache(one, rows, size, dtype) for _ in range(config.num_layers))
    shape = (config.num_layers, rows, config.num_kv_heads, size, config.head_dim)
    scales = jnp.zeros((2, *shape[:-1])) if dtype == jnp.int8 else None
    # Two separate arrays of zeros: the same array cannot be donated twice.
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), scales)


@flax.struct.dataclass
class Chunks:
    """Where the Q tokens of a call go in the cache, and which slots each of them attends to.

    A chunk is a run of at most T consecutive tokens of one row. Attention is computed chunk by
    chunk, everything else token by token, so prompts of different lengths need no padding.

    Example: three prompts are read into a cache of B = 4 rows, in chunks of T = 4 tokens that look
    at C = 8 slots. `abcdef` goes to row 2; `abcxy` goes to row 0, copies `abc` from row 2 and
    computes only `xy`; `z` goes to row 3. A dot is a value that nothing reads.

        tokens of the call      a b c d e f x y z                  Q = 9
        rows                    2 2 2 2 2 2 0 0 3
        slots                   0 1 2 3 4 5 3 4 0
        tokens    chunk 0       0 1 2 3          abcd              R = 4
                  chunk 1       4 5 . .          ef
                  chunk 2       6 7 . .          xy
                  chunk 3       8 . . .          z
        places                  0 1 2 3 4 5 8 9 12                 chunk * T + offset
        sources   chunk 0       2 2 2 2 2 2 . .
                  chunk 1       2 2 2 2 2 2 . .
                  chunk 2       2 2 2 0 0 . . .                    abc is read from row 2
                  chunk 3       3 . . . . . . .
        copies                  2 4 0 3                            4 = B: chunk 1 copies nothing

    Attributes:
      rows, slots: int32[Q], where the keys and values of each token are written. A row past the
        end writes nothing.
      tokens: int32[R, T], index of each chunk's tokens among the Q.
      places: int32[Q], index of each token among the R * T of `tokens`.
      sources: int32[R, C], the row that each slot is read from, so that a prompt can attend to the
        keys of another one that begins alike, even one of the same call. None if chunk r reads
        row r.
      copies: int32[R], the row that the slots a chunk looked at are copied to; a row past the end
        copies nothing. None together with `sources`.
      window: C.
    """

    rows: jax.Array
    slots: jax.Array
    tokens: jax.Array
    places: jax.Array
    sources: jax.Array | None
    copies: jax.Array | None
    window: int = flax.struct.field(pytree_node=False)

    def mask(self, sliding_window: int | None) -> jax.Array:
        """bool[R, 1, T, C]: a token attends to the slots up to its own."""
        queries = self.slots[self.tokens]
        keys = jnp.broadcast_to(jnp.arange(self.window), (len(queries), self.window))
        same = jnp.ones_like(queries), jnp.ones_like(keys)
        return attention_mask(queries, keys, *same, sliding_window)


def write_cache(
    cache: KVCache, layer: jax.Array | int, chunks: Chunks, k: jax.Array, v: jax.Array
) -> tuple[KVCache, jax.Array, jax.Array]:
    """Stores keys and values [Q, K, H] of one layer.

    Returns:
      The cache, and the layer's keys and values [R, K, C, H] that each chunk attends to.
    """
    heads, seen = np.arange(cache.keys.shape[2]), np.arange(chunks.window)

    def store(stored, new):  # [L, B, K, S, ...] and [Q, K, ...]
        new = new.astype(stored.dtype)
        rows, slots = chunks.rows[:, None], chunks.slots[:, None]
        stored = stored.at[layer, rows, heads, slots].set(new, mode="drop")
        if chunks.sources is None:
            return stored, stored[layer, :, :, : chunks.window]
        looked_at = stored[layer, chunks.sources[:, None], heads[:, None], seen]
        # In each layer, not once after all: the keys are loaded already, and the cache is updated
        # in place.
        stored = stored.at[layer, chunks.copies, :, : chunks.window].set(looked_at, mode="drop")
        return stored, looked_at

    if cache.scales is None:
        (keys, k), (values, v) = store(cache.keys, k), store(cache.values, v)
        return KVCache(keys, values), k, v
    (k, k_scale), (v, v_scale) = quantize(k), quantize(v)
    (keys, k), (values, v) = store(cache.keys, k), store(cache.values, v)
    scales, of_seen = jax.vmap(store)(cache.scales, jnp.stack([k_scale, v_scale]))
    k_scale, v_scale = of_seen[..., None]
    return KVCache(keys, values, scales), k * k_scale, v * v_scale
