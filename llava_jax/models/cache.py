"""The key-value cache of a decoder: a pool of pages, and how tokens are read into them.

P pages of the pool, S slots of a page, L layers, K kv heads, H head size; of one call: Q tokens,
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

PAGE = 16  # slots of a page
NO_PAGE = np.iinfo(np.int32).max  # past the end of every pool: what is written there is dropped


@flax.struct.dataclass
class KVCache:
    """Keys and values of the tokens read so far, in pages of consecutive positions.

    Slot s of a sequence's page n holds its position n * PAGE + s. Which pages a sequence has, and
    in which order, is known to the host alone.

    Attributes:
      keys, values: [L, P, K, S, H]; the slots of a head are adjacent, as attention multiplies them.
      scales: float32[2, L, P, K, S], the factors of int8 keys and of int8 values; None otherwise.
    """

    keys: jax.Array
    values: jax.Array
    scales: jax.Array | None = None


def empty_cache(
    config: "DecoderConfig", pages: int, dtype, stacked: bool = True
) -> KVCache | tuple[KVCache, ...]:
    """A cache of so many pages: one for all layers, or one for each layer.

    Args:
      dtype: of keys and values; int8 adds one scale for each token and head.
      stacked: the decoder's own, see `Decoder.stacked`.
    """
    if not stacked:
        one = dataclasses.replace(config, num_layers=1)
        return tuple(empty_cache(one, pages, dtype) for _ in range(config.num_layers))
    shape = (config.num_layers, pages, config.num_kv_heads, PAGE, config.head_dim)
    scales = jnp.zeros((2, *shape[:-1])) if dtype == jnp.int8 else None
    # Two separate arrays of zeros: the same array cannot be donated twice.
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), scales)


@flax.struct.dataclass
class Chunks:
    """Where the Q tokens of a call go in the cache, and which slots each of them attends to.

    A chunk is a run of at most T consecutive tokens of one sequence. Attention is computed chunk by
    chunk, everything else token by token, so prompts of different lengths need no padding.

    Example with pages of two slots: three prompts are read in chunks of T = 4 tokens that look at
    C = 8 slots. `abcdef` has pages 5, 1 and 2; `abxyz` shares page 5, which holds `ab`, and
    computes only `xyz`, in pages 0 and 3; `z` has page 4. A dot is a value that nothing reads.

        tokens of the call      a b c d e f x y z z                Q = 10
        slots                   0 1 2 3 4 5 2 3 4 0
        pages                   5 5 1 1 2 2 0 0 3 4
        tokens    chunk 0       0 1 2 3          abcd              R = 4
                  chunk 1       4 5 . .          ef
                  chunk 2       6 7 8 .          xyz
                  chunk 3       9 . . .          z
        places                  0 1 2 3 4 5 8 9 10 12              chunk * T + offset
        tables    chunk 0       5 1 2 .
                  chunk 1       5 1 2 .
                  chunk 2       5 0 3 .                            ab is read from page 5
                  chunk 3       4 . . .

    Attributes:
      slots: int32[Q], position of each token in its sequence.
      pages: int32[Q], where its keys and values are written; NO_PAGE writes nothing.
      tokens: int32[R, T], index of each chunk's tokens among the Q.
      places: int32[Q], index of each token among the R * T of `tokens`.
      tables: int32[R, C / PAGE], the pages of each chunk's sequence, in its order. Keys of another
        token of the same call are there, so prompts of one call can share pages.
    """

    slots: jax.Array
    pages: jax.Array
    tokens: jax.Array
    places: jax.Array
    tables: jax.Array

    def mask(self, sliding_window: int | None) -> jax.Array:
        """bool[R, 1, T, C]: a token attends to the slots up to its own."""
        queries = self.slots[self.tokens]
        window = self.tables.shape[1] * PAGE
        keys = jnp.broadcast_to(jnp.arange(window), (len(queries), window))
        same = jnp.ones_like(queries), jnp.ones_like(keys)
        return attention_mask(queries, keys, *same, sliding_window)


def write_cache(
    cache: KVCache, layer: jax.Array | int, chunks: Chunks, k: jax.Array, v: jax.Array
) -> KVCache:
    """Stores keys and values [Q, K, H] of one layer."""
    heads = np.arange(cache.keys.shape[2])
    pages, slots = chunks.pages[:, None], chunks.slots[:, None] % PAGE

    def store(stored, new):  # [L, P, K, S, ...] and [Q, K, ...]
        return stored.at[layer, pages, heads, slots].set(new.astype(stored.dtype), mode="drop")

    if cache.scales is None:
        return KVCache(store(cache.keys, k), store(cache.values, v))
    (k, k_scale), (v, v_scale) = quantize(k), quantize(v)
    scales = jax.vmap(store)(cache.scales, jnp.stack([k_scale, v_scale]))
    return KVCache(store(cache.keys, k), store(cache.values, v), scales)


def read_cache(
    cache: KVCache, layer: jax.Array | int, tables: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Keys and values [R, K, n * S, H] of one layer, of the pages int32[R, n]."""
    heads = np.arange(cache.keys.shape[2])[:, None]

    def look(stored):  # [L, P, K, S, ...] -> [R, K, n, S, ...]
        found = stored.at[layer, tables[:, None], heads].get(mode="promise_in_bounds")
        return found.reshape(*found.shape[:2], -1, *found.shape[4:])

    k, v = look(cache.keys), look(cache.values)
    if cache.scales is None:
        return k, v
    k_scale, v_scale = jax.vmap(look)(cache.scales)[..., None]
    return k * k_scale, v * v_scale
