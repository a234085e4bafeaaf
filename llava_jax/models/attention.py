"""Attention: its mask, and the one entry to every implementation.

B rows, T query length, S key length, N heads, K kv heads, H head size.
"""

import functools
import re

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llava_jax.models.blocked_attention import BLOCK, blocked_attention, stacks_product
from llava_jax.models.flash_attention import (
    ATTENTION_OUT,
    SPLASH_TILE,
    PackedCausal,
    cudnn_attention,
    on_each_shard,
    splash_attention,
)
from llava_jax.models.linear import product_dtype, transposed

IMPLEMENTATIONS = ("xla", "blocks", "cudnn", "splash")
LONG_ROW = 2048  # tokens; longer rows have so many scores that they are computed in blocks


def choose_attention(
    name: str, device: jax.Device, shards: int, dtype, decoder, length: int, turns: bool
) -> tuple[str, str]:
    """The implementation to train with, and why it is not the device's own kernel.

    Args:
      name: one of IMPLEMENTATIONS, or `auto`: the device's kernel if it can do the work, else xla;
        long rows in blocks on a device that has no kernel.
      device: one of the mesh.
      shards: of the mesh, over which heads are split.
      decoder: its DecoderConfig.
      length: tokens of a row.
      turns: whether rows hold independent turns.

    Returns:
      (one of IMPLEMENTATIONS, reasons); the reasons are empty if the device's kernel was taken, if
      it has none, or if another implementation was named.

    Raises:
      ValueError: the named implementation cannot do the work.
    """
    cannot = {
        "xla": {},
        "blocks": {
            f"a row's length must be a multiple of {BLOCK}": bool(length % BLOCK),
            **_uneven_heads(shards, decoder),
        },
        "cudnn": _cannot_use_cudnn(device, shards, dtype, decoder, length),
        "splash": {
            "it runs on TPUs": device.platform != "tpu",
            f"a row's length must be a multiple of {SPLASH_TILE}": bool(length % SPLASH_TILE),
            "it cannot keep independent turns apart": turns,
            **_uneven_heads(shards, decoder),
        },
    }
    reasons = {n: "; ".join(r for r, holds in cannot[n].items() if holds) for n in cannot}
    if name != "auto":
        if reasons[name]:
            raise ValueError(f"{name} attention cannot be used here: {reasons[name]}")
        return name, ""
    without_kernel = "xla" if length <= LONG_ROW or reasons["blocks"] else "blocks"
    kernel = {"tpu": "splash", "gpu": "cudnn"}.get(device.platform, without_kernel)
    return ("xla", f"{kernel}: {reasons[kernel]}") if reasons[kernel] else (kernel, "")


def _cannot_use_cudnn(device, shards: int, dtype, decoder, length: int) -> dict[str, bool]:
    """What cuDNN's kernels refuse, as jax._src.cudnn.fused_attention_stablehlo has it."""
    version = re.fullmatch(r"\d+\.\d+", getattr(device, "compute_capability", None) or "")
    capability = float(version[0]) if device.platform == "gpu" and version else 0.0
    largest = 256 if capability >= 9 else 128
    return {
        "it runs on NVIDIA GPUs from Ampere (A100) on": capability < 8,
        "it takes bfloat16": jnp.dtype(dtype) != jnp.bfloat16,
        "a row's length must be even": bool(length % 2),
        f"a head's size must be a multiple of 8 up to {largest}": (
            bool(decoder.head_dim % 8) or decoder.head_dim > largest
        ),
        **_uneven_heads(shards, decoder),
    }


def _uneven_heads(shards: int, decoder) -> dict[str, bool]:
    fault = f"{shards} shards of the mesh's tensor axis must divide {decoder.num_heads} heads"
    return {fault: bool(decoder.num_heads % shards)}


def attention_mask(
    query_positions: jax.Array,
    key_positions: jax.Array,
    query_segments: jax.Array,
    key_segments: jax.Array,
    sliding_window: int | None = None,
    turns: jax.Array | None = None,
) -> jax.Array:
    """Which keys each query attends to: same segment, not later, within the window.

    Positions restart in each segment and are compared only within one. Four arrays describe a
    packed row, a padded row and a partly filled cache alike. Example, a row with conversations of
    three and two tokens and one token of padding:

        segments    1 1 1 2 2 0
        positions   0 1 2 0 1 0

        query 0     x . . . . .
        query 1     x x . . . .
        query 2     x x x . . .         with sliding_window=2:  . x x . . .
        query 3     . . . x . .
        query 4     . . . x x .
        query 5     . . . . . x         padding attends to padding: finite, never used

    With `turns`, a segment is a shared beginning (0) and independent continuations 1, 2, ...; a
    query attends to the beginning and to its own turn:

        segments    1 1 1 1 1
        positions   0 1 2 2 3
        turns       0 0 1 2 2

        query 2     x x x . .
        query 3     x x . x .
        query 4     x x . x x

    Args:
      query_positions, query_segments: int[B, T].
      key_positions, key_segments: int[B, S].
      sliding_window: number of latest positions a query attends to, its own included (Mistral).
      turns: int[B, T]; queries and keys must be the same tokens.

    Returns:
      bool[B, 1, T, S].
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

    Args:
      query: [B, T, N, H].
      key, value: [B, S, K, H] with N a multiple of K.
      mask: bool[B, 1, T, S], or None if every query attends to every key (vision). Splash takes
        `PackedCausal` instead.
      implementation: one of IMPLEMENTATIONS.

    Returns:
      [B, T, N, H] in the query's dtype.
    """
    if implementation == "splash":
        return splash_attention(query, key, value, mask)
    if implementation == "cudnn":
        return cudnn_attention(query, key, value, mask)
    if implementation == "blocks":
        with jax.named_scope("attention"):
            block = BLOCK, BLOCK
            if mask is None:  # a tower's rows are short: a block each
                block = query.shape[1], key.shape[1]
                mask = jnp.ones((len(query), 1, *block), bool)
            run = lambda *row: blocked_attention(*row, block)
            return on_each_shard(run, query, key, value, mask)
    batch, length, heads, size = query.shape
    kv_heads = key.shape[2]
    operands = product_dtype(query.dtype)
    # The queries of one kv head become rows of one matrix: scores and sums are plain products.
    q = query.reshape(batch, length, kv_heads, -1, size).transpose(0, 2, 3, 1, 4)
    q = q.reshape(batch, kv_heads, -1, size).astype(operands)  # [B, K, N / K * T, H]
    k, v = (x.swapaxes(1, 2).astype(operands) for x in (key, value))  # [B, K, S, H]
    with jax.named_scope("attention"):
        out = _weighted_mean(q, k, v, mask, size**-0.5).astype(query.dtype)
    out = out.reshape(batch, kv_heads, -1, length, size).transpose(0, 3, 1, 2, 4)
    return out.reshape(query.shape)


def attention_shares(query: jax.Array, key: jax.Array, mask: jax.Array) -> jax.Array:
    """The share of each key in what `attention` gives to each query, the mean over its heads.

    Args:
      query, key, mask: as in `attention`.

    Returns:
      float32[B, T, S], of sum 1 over S.
    """
    batch, length, heads, size = query.shape
    operands = product_dtype(query.dtype)
    q = query.reshape(batch, length, key.shape[2], -1, size).transpose(0, 2, 3, 1, 4)
    q = q.reshape(batch, key.shape[2], -1, size).astype(operands)  # [B, K, N / K * T, H]
    scores = stacks_product(q, key.swapaxes(1, 2).astype(operands), -1) * size**-0.5
    scores = scores.reshape(batch, heads, length, -1)
    scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    return jnp.mean(jax.nn.softmax(scores, axis=-1), axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _weighted_mean(q: jax.Array, k: jax.Array, v: jax.Array, mask, scale: float) -> jax.Array:
    """softmax(scale * q k^T) v, float32 [B, K, G * T, H].

    The rows of the result and of its gradient are divided by the softmax's sums, not the weights:
    there are fewer numbers to divide.

    Args:
      q: [B, K, G * T, H], the G query heads of a kv head one after another.
      k, v: [B, K, S, H].
      mask: bool[B, 1, T, S] or None.
    """
    return _weighted_mean_forward(q, k, v, mask, scale)[0]


def _weighted_mean_forward(q, k, v, mask, scale):
    scores = stacks_product(q, k, -1) * scale  # [B, K, G * T, S]
    if mask is not None:
        length, keys = mask.shape[2:]
        of_heads = scores.reshape(*scores.shape[:2], -1, length, keys)
        of_heads = jnp.where(mask[:, :, None], of_heads, jnp.finfo(scores.dtype).min)
        scores = of_heads.reshape(scores.shape)
    largest = jnp.max(scores, axis=-1, keepdims=True)
    powers = jnp.exp(scores - largest)
    share = 1 / jnp.sum(powers, axis=-1, keepdims=True)
    powers = powers.astype(q.dtype)
    out = checkpoint_name(stacks_product(powers, v, -2) * share, ATTENTION_OUT)
    return out, (q, k, v, powers, share, out)


def _weighted_mean_backward(scale, residuals, d_out):
    q, k, v, powers, share, out = residuals
    d_out = d_out * share
    mean = jnp.sum(d_out * out, axis=-1, keepdims=True)
    d_out = d_out.astype(q.dtype)
    d_scores = powers * (stacks_product(d_out, v, -1) - mean) * scale
    d_scores = d_scores.astype(q.dtype)
    d_q = stacks_product(d_scores, k, -2).astype(q.dtype)
    d_k = stacks_product(transposed(d_scores), q, -2).astype(q.dtype)
    d_v = stacks_product(transposed(powers), d_out, -2).astype(q.dtype)
    return d_q, d_k, d_v, None


_weighted_mean.defvjp(_weighted_mean_forward, _weighted_mean_backward)
