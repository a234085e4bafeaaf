"""Attention block by block, without the matrix of scores in memory, in plain XLA.

For long rows where no kernel of the device does it. The softmax's sum is that of the blocks of keys
so far (https://arxiv.org/abs/2205.14135), and blocks of keys that no query of a block attends to
are left out. Example, a packed row with conversations of five and three tokens, in blocks of two:

    segments    1 1 1 1 1 2 2 2

    queries 0 1    x . . .
    queries 2 3    x x . .
    queries 4 5    x x x .
    queries 6 7    . . x x

B rows, T query length, S key length, N heads, K kv heads, G = N / K, H head size; i blocks of t
queries, j blocks of s keys.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llava_jax.models.flash_attention import ATTENTION_OUT
from llava_jax.models.linear import product_dtype, transposed

BLOCK = 512  # tokens
LOWEST = jnp.finfo(jnp.float32).min


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def blocked_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    block: tuple[int, int],
) -> jax.Array:
    """`attention` of long rows, one after the other.

    Args:
      query, key, value, mask: as in `attention`.
      block: (t, s), which divide T and S.

    Returns:
      [B, T, N, H] in the query's dtype.
    """
    return _forward(query, key, value, mask, block)[0]


def _forward(query, key, value, mask, block: tuple[int, int]):
    """The result [B, T, N, H], and the logarithm of each softmax's sum [B, i, K, G * t, 1]."""
    kv_heads, (t, s) = key.shape[2], block

    def of_row(row):
        query, key, value, mask = row
        q, k, v = queries_by_head(query, kv_heads, t), _keys(key, s), _keys(value, s)

        def of_queries(one):
            q, mask = one  # [K, G * t, H], [j, t, s]
            add = lambda j, so_far: add_keys(so_far, q, k[j], v[j], mask[j])
            largest, total, out = jax.lax.fori_loop(*blocks_seen(mask), add, no_keys(q))
            return out / total, largest + jnp.log(total)

        out, sums = jax.lax.map(of_queries, (q, _pairs(mask, t, s)))
        return queries_in_order(out, t).astype(query.dtype), sums

    return jax.lax.map(of_row, (query, key, value, mask[:, 0]))


def _named_forward(query, key, value, mask, block):
    found = _forward(query, key, value, mask, block)
    out, sums = (checkpoint_name(x, ATTENTION_OUT) for x in found)
    return out, (query, key, value, mask, out, sums)


def _backward(block, residuals, d_out):
    of_row = functools.partial(_row_backward, block=block)
    return *jax.lax.map(of_row, (*residuals, d_out)), None


blocked_attention.defvjp(_named_forward, _backward)


def _row_backward(row, block: tuple[int, int]):
    """Gradients of one row: [T, N, H] of the query, [S, K, H] of key and value."""
    query, key, value, mask, out, sums, d_out = row
    t, s = block
    kv_heads = key.shape[1]
    blocks = functools.partial(queries_by_head, kv_heads=kv_heads, t=t)
    q, k, v, d_out, mask = blocks(query), _keys(key, s), _keys(value, s), blocks(d_out), mask[0]
    means = jnp.sum(blocks(out).astype(jnp.float32) * d_out, axis=-1, keepdims=True)
    scale = query.shape[-1] ** -0.5

    def of_queries(so_far, one):
        q, d_out, sums, means, mask = one

        def of_keys(j, so_far):
            d_q, d_k, d_v = so_far
            powers = jnp.exp(_scores(q, k[j], mask[j]) - sums)  # [K, G * t, s]
            d_scores = powers * (stacks_product(d_out, v[j], -1) - means) * scale
            d_scores, powers = d_scores.astype(q.dtype), powers.astype(q.dtype)
            d_k = _add(d_k, j, stacks_product(transposed(d_scores), q, -2))
            d_v = _add(d_v, j, stacks_product(transposed(powers), d_out, -2))
            return d_q + stacks_product(d_scores, k[j], -2), d_k, d_v

        d_q, *so_far = jax.lax.fori_loop(*blocks_seen(mask), of_keys, (jnp.zeros(q.shape), *so_far))
        return so_far, d_q

    start = [jnp.zeros(x.shape) for x in (k, v)]
    (d_k, d_v), d_q = jax.lax.scan(of_queries, start, (q, d_out, sums, means, _pairs(mask, t, s)))
    d_k, d_v = (x.swapaxes(1, 2).reshape(key.shape) for x in (d_k, d_v))
    return tuple(x.astype(query.dtype) for x in (queries_in_order(d_q, t), d_k, d_v))


def no_keys(q: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What `add_keys` starts from, for queries [..., G * t, H]."""
    one = jnp.zeros((*q.shape[:-1], 1))
    return one + LOWEST, one, jnp.zeros(q.shape)


def add_keys(so_far, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array):
    """Attention of queries [..., K, G * t, H] with a block of keys more, [..., K, s, H].

    Args:
      so_far: of each query the largest score, the sum of the powers and, weighted with these, the
        sum of the values.
      mask: bool[..., t, s].
    """
    largest, total, out = so_far
    scores = _scores(q, k, mask)
    new = jnp.maximum(largest, jnp.max(scores, axis=-1, keepdims=True))
    powers, shrink = jnp.exp(scores - new), jnp.exp(largest - new)
    total = total * shrink + jnp.sum(powers, axis=-1, keepdims=True)
    return new, total, out * shrink + stacks_product(powers.astype(v.dtype), v, -2)


def queries_by_head(x: jax.Array, kv_heads: int, t: int) -> jax.Array:
    """[T, N, H] -> [i, K, G * t, H]: the queries of one kv head become rows of one matrix."""
    length, _, size = x.shape
    x = x.reshape(length // t, t, kv_heads, -1, size).transpose(0, 2, 3, 1, 4)
    return x.reshape(length // t, kv_heads, -1, size).astype(product_dtype(x.dtype))


def queries_in_order(x: jax.Array, t: int) -> jax.Array:
    """[i, K, G * t, H] -> [T, N, H]."""
    blocks, kv_heads, _, size = x.shape
    x = x.reshape(blocks, kv_heads, -1, t, size).transpose(0, 3, 1, 2, 4)
    return x.reshape(blocks * t, -1, size)


def _keys(x: jax.Array, s: int) -> jax.Array:
    """[S, K, H] -> [j, K, s, H]."""
    x = x.reshape(-1, s, *x.shape[1:]).swapaxes(1, 2)
    return x.astype(product_dtype(x.dtype))


def _pairs(mask: jax.Array, t: int, s: int) -> jax.Array:
    """[T, S] -> [i, j, t, s]."""
    return mask.reshape(-1, t, mask.shape[1] // s, s).swapaxes(1, 2)


def blocks_seen(mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """From which block of keys to which the queries of a block look; mask: [j, t, s]."""
    seen = jnp.any(mask, axis=(1, 2))
    return jnp.argmax(seen), seen.size - jnp.argmax(seen[::-1])


def _scores(q: jax.Array, k: jax.Array, mask: jax.Array) -> jax.Array:
    """float32[..., K, G * t, s] of queries and keys under a mask, as in `add_keys`."""
    scores = stacks_product(q, k, -1) * q.shape[-1] ** -0.5
    of_heads = scores.reshape(*k.shape[:-2], -1, *mask.shape[-2:])
    return jnp.where(mask[..., None, None, :, :], of_heads, LOWEST).reshape(scores.shape)


def stacks_product(x: jax.Array, y: jax.Array, y_axis: int) -> jax.Array:
    """float32 products of two stacks of matrices, over the last axis of x and -1 or -2 of y."""
    stack = tuple(range(x.ndim - 2))
    axes = ((x.ndim - 1,), (y.ndim + y_axis,)), (stack, stack)
    return jax.lax.dot_general(x, y, axes, preferred_element_type=jnp.float32)


def _add(sums: jax.Array, j: jax.Array, x: jax.Array) -> jax.Array:
    """sums[j] += x, in place."""
    return jax.lax.dynamic_update_index_in_dim(sums, sums[j] + x, j, 0)
