"""Attention of tokens that are read into a cache in pages, without gradients.

B rows, T query length, S key length, N heads, K kv heads, H head size.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from llava_jax.models.blocked_attention import (
    BLOCK,
    add_keys,
    blocks_seen,
    no_keys,
    queries_by_head,
    queries_in_order,
)

LONG_ROW = 256  # tokens of a row that have many scores
FEWEST_KEYS = 64  # of a block: fewer take longer to add up than to read
FAST_BYTES = {"cpu": 2**23, "tpu": 2**24}  # of keys and values that stay in its fast memory


def cached_attention(
    query: jax.Array, tables: jax.Array, mask: jax.Array, read: Callable[[jax.Array], tuple]
) -> jax.Array:
    """`attention` of tokens with keys and values in pages.

    These are read from their pages block by block, so that they stay in fast memory. Blocks that no
    query attends to are left out: of a causal mask nearly half, and all slots that are not filled.
    Long rows are computed one after the other.

        mask  x . . .   T = 2, keys in blocks of 2: the second block is left out
              x x . .

    Args:
      query: [B, T, N, H].
      tables: int32[B, n], the pages of each row.
      mask: bool[B, 1, T, S], for the S slots of the n pages.
      read: tables int32[B, m] -> keys and values [B, K, m * S / n, H].

    Returns:
      [B, T, N, H] in the query's dtype.
    """
    attend = functools.partial(_by_blocks, read=read)
    pages = tables.shape[1]
    page = mask.shape[3] // pages
    with jax.named_scope("attention"):
        if query.shape[1] >= LONG_ROW and mask.shape[3] >= 2 * BLOCK:
            some = _pages_a_block(BLOCK, pages, page)
            one_row = lambda row: attend(*(x[None] for x in row), some=some)[0]
            return jax.lax.map(one_row, (query, tables, mask))
        a_key = jax.eval_shape(read, tables[:, :1])[0]
        bytes_of_key = 2 * a_key.size // a_key.shape[2] * jnp.dtype(query.dtype).itemsize
        some = {
            name: _pages_a_block(size // bytes_of_key, pages, page)
            for name, size in FAST_BYTES.items()
        }
        if {*some.values()} == {pages}:  # each branch would be traced
            return attend(query, tables, mask, some=pages)
        per_platform = {name: functools.partial(attend, some=few) for name, few in some.items()}
        whole = functools.partial(attend, some=pages)  # a GPU's loop waits for the host
        return jax.lax.platform_dependent(query, tables, mask, **per_platform, default=whole)


def _pages_a_block(keys: int, pages: int, page: int) -> int:
    """The pages of a block of about so many keys: all, or a power of two that divides them."""
    if keys >= pages * page:
        return pages
    some = 1 << (min(max(keys, FEWEST_KEYS), BLOCK) // page).bit_length() - 1
    return min(some, pages & -pages)


def _by_blocks(query, tables, mask, read, some: int) -> jax.Array:
    """`cached_attention` of all rows at once, so many pages of each row at a time."""
    (batch, length, heads, size), pages = query.shape, tables.shape[1]
    page = mask.shape[3] // pages
    kv_heads = jax.eval_shape(read, tables)[0].shape[1]
    q = queries_by_head(query.reshape(-1, heads, size), kv_heads, length)  # [B, K, G * T, H]

    def add_block(i, so_far):
        at = lambda x, width: jax.lax.dynamic_slice_in_dim(x, i * width, width, -1)
        k, v = (x.astype(query.dtype).astype(q.dtype) for x in read(at(tables, some)))
        return add_keys(so_far, q, k, v, at(mask[:, 0], some * page))

    if some == pages:
        _, total, out = add_block(0, no_keys(q))
    else:
        seen = mask.reshape(batch * length, -1, some * page).swapaxes(0, 1)
        _, total, out = jax.lax.fori_loop(*blocks_seen(seen), add_block, no_keys(q))
    return queries_in_order((out / total).astype(query.dtype), length).reshape(query.shape)
