"""Attention without the matrix of scores in memory: splash on TPU, cuDNN on NVIDIA GPUs.

For real tokens each kernel equals `attention` up to rounding.

B rows, T length, N heads, K kv heads, H head size.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator

import flax
import jax
import jax.numpy as jnp

SPLASH_TILE = 128  # a row's length must be a multiple
ATTENTION_OUT = "attention_out"  # the name of the result in remat policies; cuDNN's has none


@flax.struct.dataclass
class PackedCausal:
    """The mask of a packed row as T numbers instead of T x T.

    Attributes:
      segment_ids: int[B, T]; a query attends to the keys of its segment up to its own.
      sliding_window: number of latest positions a query attends to, its own included.
    """

    segment_ids: jax.Array
    sliding_window: int | None = flax.struct.field(pytree_node=False, default=None)


def splash_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: PackedCausal, interpret: bool = False
) -> jax.Array:
    """Attention by JAX's block-sparse TPU kernel, one program on each shard of the mesh.

    Blocks that are masked as a whole are never read.

    Args:
      query: [B, T, N, H], T a multiple of SPLASH_TILE.
      key, value: [B, T, K, H] with N a multiple of K.
      interpret: emulate the kernel on any device (for tests).

    Returns:
      [B, T, N, H] in the query's dtype.
    """
    run = functools.partial(_splash, window=mask.sliding_window, interpret=interpret)
    return on_each_shard(run, query, key, value, mask.segment_ids)


def cudnn_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array
) -> jax.Array:
    """Attention by cuDNN's fused kernel, one program on each shard of the mesh.

    Args and result are those of `attention`, in float16 or bfloat16.
    """
    return on_each_shard(_cudnn, query, key, value, mask)


def on_each_shard(run: Callable, query, key, value, mask: jax.Array) -> jax.Array:
    """run(query, key, value, mask) on the rows and heads of each device.

    Rows are sharded over the mesh axes of `batch`, heads over those of `act_heads` if their number
    allows it. With fewer kv heads than shards a device gets a copy of the one that its query heads
    share. Example, four query heads and two kv heads over four devices:

        device      0   1   2   3
        query       q0  q1  q2  q3
        key         k0  k0  k1  k1

    Args:
      mask: an array whose first axis is the rows.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return run(query, key, value, mask)
    heads = flax.linen.logical_to_mesh_axes(("batch", None, "act_heads", None))
    rows = flax.linen.logical_to_mesh_axes(("batch", *[None] * (mask.ndim - 1)))
    if heads[2] is not None and query.shape[2] % mesh.shape[heads[2]]:
        heads = jax.sharding.PartitionSpec(heads[0])
    elif heads[2] is not None:
        copies = math.lcm(key.shape[2], mesh.shape[heads[2]]) // key.shape[2]
        key, value = (jnp.repeat(x, copies, axis=2) for x in (key, value))
    sharded = jax.shard_map(
        run,
        in_specs=(heads, heads, heads, rows),
        out_specs=heads,
        axis_names=set(mesh.axis_names) - set(mesh.manual_axes),
        check_vma=False,
    )
    return sharded(query, key, value, mask)


def _splash(query, key, value, segment_ids, window: int | None, interpret: bool) -> jax.Array:
    _, length, heads, size = query.shape
    attend = _splash_kernel(length, heads, window, interpret)
    query, key, value = (x.swapaxes(1, 2) for x in (query * size**-0.5, key, value))
    segments = _splash_library()[0].SegmentIds(segment_ids, segment_ids)
    out = jax.vmap(attend)(query, key, value, segments)  # [B, N, T, H]
    return out.swapaxes(1, 2).astype(query.dtype)


def _splash_library():
    """JAX's kernel and its masks, imported when used: Pallas takes a while to import."""
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel,
        splash_attention_mask,
    )

    return splash_attention_kernel, splash_attention_mask


def _splash_kernel(length: int, heads: int, window: int | None, interpret: bool):
    """The kernel for rows of `length`, with tiles that divide it."""
    kernel, masks = _splash_library()
    block = max(b for b in (128, 256, 512, 1024) if length % b == 0)
    local = masks.LocalMask((length, length), (window and window - 1, 0), 0)
    blocks = kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=min(block, 512),
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=min(block, 512),
        use_fused_bwd_kernel=True,
    )
    return kernel.make_splash_mha(
        masks.MultiHeadMask([local] * heads),
        block_sizes=blocks,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=ATTENTION_OUT,
        interpret=interpret,
    )


def _cudnn(query, key, value, mask) -> jax.Array:
    with _no_gradient_of_masks():
        return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation="cudnn")


@contextlib.contextmanager
def _no_gradient_of_masks() -> Iterator[None]:
    """Keeps cuDNN's backward pass from computing the gradient of the mask, which nothing reads.

    To jax before 0.11.2 a mask is a bias like any other, and has a gradient: B x N x T x T numbers
    in memory. Later versions leave it out by themselves.
    """
    from jax._src.cudnn import fused_attention_stablehlo as library

    asks = getattr(library, "should_export_dbias", None)
    if asks is None:
        yield
        return
    library.should_export_dbias = lambda *_: False
    try:
        yield
    finally:
        library.should_export_dbias = asks
