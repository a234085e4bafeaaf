"""The one attention entry of the project.

B rows, T query length, S key length, N heads, K kv heads, H head size.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from llava_jax.models.flash_attention import (
    SPLASH_TILE,
    PackedCausal,
    cudnn_attention,
    splash_attention,
)
from llava_jax.models.precision import product_dtype, transposed

IMPLEMENTATIONS = ("xla", "cudnn", "splash")


def choose_attention(name: str, platform: str, dtype, length: int, turns: bool) -> str:
    """The implementation that `name` means for training on a platform.

    Args:
      name: one of IMPLEMENTATIONS, or `auto`: the platform's kernel where it can do the work.
      platform: of the mesh's devices: tpu, gpu, cpu.
      length: tokens of a row.
      turns: rows hold independent turns.

    Raises:
      ValueError: the one asked for cannot do the work.
    """
    cannot = {
        "xla": {},
        "cudnn": {
            "it runs on NVIDIA GPUs": platform not in ("gpu", "cuda"),
            "it takes bfloat16": jnp.dtype(dtype) != jnp.bfloat16,
        },
        "splash": {
            "it runs on TPUs": platform != "tpu",
            f"a row's length must be a multiple of {SPLASH_TILE}": bool(length % SPLASH_TILE),
            "it cannot keep independent turns apart": turns,
        },
    }
    if name == "auto":
        return next(n for n in ("splash", "cudnn", "xla") if not any(cannot[n].values()))
    reasons = [reason for reason, holds in cannot[name].items() if holds]
    if reasons:
        raise ValueError(f"{name} attention cannot be used here: {'; '.join(reasons)}")
    return name


def attention_mask(
    query_positions: jax.Array,
    key_positions: jax.Array,
    query_segments: jax.Array,
    key_segments: jax.Array,
    sliding_window: int | None = None,
    turns: jax.Array | None = None,
) -> jax.Array:
    """Who may look at whom: same segment, not later, and not further back than the window.

    Positions restart in each segment, so comparing them is only meaningful within one; a packed
    row, a padded row and a part-filled KV cache are all described by these four arrays.

    Args:
      query_positions, query_segments: int[B, T].
      key_positions, key_segments: int[B, S].
      sliding_window: number of latest positions a query sees, itself included (Mistral).
      turns: int[B, T], with keys that are the queries: independent continuations 1, 2, … of what
        a segment begins with (0); a query sees that beginning and its own turn.

    Returns:
      bool[B, 1, T, S]. Padding (segment 0) sees only padding: finite, and never used.
    """
    distance = query_positions[:, :, None] - key_positions[:, None, :]  # [B, T, S]
    mask = (query_segments[:, :, None] == key_segments[:, None, :]) & (distance >= 0)
    if sliding_window is not None:
        mask &= distance < sliding_window
    if turns is not None:
        key_turns = turns[:, None, :]
        mask &= (key_turns == 0) | (key_turns == turns[:, :, None])
    return mask[:, None]


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | PackedCausal | None = None,
    implementation: str = "xla",
) -> jax.Array:
    """Scaled dot-product attention with grouped kv heads, softmax in float32.

    The one entry to every implementation.

    Args:
      query: [B, T, N, H].
      key, value: [B, S, K, H] with N a multiple of K.
      mask: bool[B, 1, T, S], or None where every query sees every key (vision); splash takes
        `PackedCausal` in its place.
      implementation: one of IMPLEMENTATIONS.

    Returns:
      [B, T, N, H] in the query's dtype.
    """
    if implementation == "splash":
        return splash_attention(query, key, value, mask)
    if implementation == "cudnn":
        return cudnn_attention(query, key, value, mask)
    batch, length, heads, size = query.shape
    kv_heads = key.shape[2]
    operands = product_dtype(query.dtype)
    # Queries that share a kv head are rows of one matrix: scores and sums are plain products.
    q = query.reshape(batch, length, kv_heads, -1, size).transpose(0, 2, 3, 1, 4)
    q = q.reshape(batch, kv_heads, -1, size).astype(operands)  # [B, K, N / K * T, H]
    k, v = (x.swapaxes(1, 2).astype(operands) for x in (key, value))  # [B, K, S, H]
    with jax.named_scope("attention"):
        scores = _batched_product(q, k, 3) * size**-0.5  # [B, K, N / K * T, S]
        scores = scores.reshape(batch, kv_heads, heads // kv_heads, length, -1)
        if mask is not None:
            scores = jnp.where(mask[:, :, None], scores, jnp.finfo(scores.dtype).min)
        weights = jax.nn.softmax(scores, axis=-1).reshape(*q.shape[:3], -1)
        out = _batched_product(weights.astype(operands), v, 2).astype(query.dtype)
    out = out.reshape(batch, kv_heads, -1, length, size).transpose(0, 3, 1, 2, 4)
    return out.reshape(query.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _batched_product(x: jax.Array, y: jax.Array, y_axis: int) -> jax.Array:
    """float32 products of two stacks of matrices, [B, K, ...] each, x over its last axis."""
    axes = (((3,), (y_axis,)), ((0, 1), (0, 1)))
    return jax.lax.dot_general(x, y, axes, preferred_element_type=jnp.float32)


def _batched_product_backward(y_axis, operands, d_out):
    x, y = operands
    d_out = d_out.astype(x.dtype)
    d_x = _batched_product(d_out, y, 2 if y_axis == 3 else 3)
    rows, columns = (d_out, x) if y_axis == 3 else (x, d_out)
    d_y = _batched_product(transposed(rows), columns, 2)
    return d_x.astype(x.dtype), d_y.astype(y.dtype)


_batched_product.defvjp(
    lambda x, y, y_axis: (_batched_product(x, y, y_axis), (x, y)), _batched_product_backward
)


@jax.custom_vjp
def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary position embedding in the half-split order of Hugging Face's Llama.

    The same numbers to rounding on all platforms; no gradient is taken of the angles.

    Args:
      x: [B, T, N, H].
      cos, sin: float32[B, T, H // 2].
    """
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jax.lax.platform_dependent(
        x, cos, sin, tpu=_rotated_by_product, default=_rotated_by_halves
    )


def _rotated_by_halves(x, cos, sin):
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def _rotated_by_product(x, cos, sin):
    """Halves swapped by a product with a signed permutation, which is exact.

    A TPU has no cheap way to move half a vector's lanes: split, keys and queries are copied into
    another layout and back, as float32.
    """
    half = x.shape[-1] // 2
    swap = np.kron([[0, 1], [-1, 0]], np.eye(half))  # x @ swap = [-second, first]
    swapped = jax.lax.dot_general(
        x, jnp.asarray(swap, x.dtype), (((3,), (0,)), ((), ())),
        precision="highest", preferred_element_type=jnp.float32,
    )  # fmt: skip
    twice = lambda angles: jnp.concatenate([angles, angles], axis=-1)
    return (x.astype(jnp.float32) * twice(cos) + swapped * twice(sin)).astype(x.dtype)


apply_rope.defvjp(
    lambda x, cos, sin: (apply_rope(x, cos, sin), (cos, sin)),
    lambda angles, dy: (apply_rope(dy, angles[0], -angles[1]), None, None),  # turned back
)
