"""Next-token cross-entropy that never holds a batch's logits, and skips unsupervised positions.

B rows, T length, D model, V vocabulary, C positions a row in one chunk, A answers in a row.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from llava_jax.models.gathering import front_order, take_rows
from llava_jax.models.linear import product, product_dtype
from llava_jax.parallel.mesh import BATCH_AXES
from llava_jax.text.tokenization import IGNORE_INDEX


def next_token_targets(
    labels: jax.Array, segment_ids: jax.Array, turn_ids: jax.Array | None = None
) -> jax.Array:
    """Labels aligned with their tokens -> the token that each position must predict.

    A target never comes from the next conversation of a packed row, nor from another turn. Two
    conversations and padding in a row of T = 7, with _ for IGNORE_INDEX:

        segment_ids   1 1 1 2 2 2 0
        labels        _ 5 6 _ 7 8 _
        targets       5 6 _ 7 8 _ _

    Args:
      labels, segment_ids: int[B, T].
      turn_ids: int[B, T], if turns are independent.

    Returns:
      int[B, T], IGNORE_INDEX at positions that predict nothing.
    """
    last = ((0, 0), (0, 1))
    targets = jnp.pad(labels[:, 1:], last, constant_values=IGNORE_INDEX)
    following = jnp.pad(segment_ids[:, 1:], last)
    same = (following == segment_ids) & (segment_ids != 0)
    if turn_ids is not None:
        same &= jnp.pad(turn_ids[:, 1:], last) == turn_ids
    return jnp.where(same, targets, IGNORE_INDEX)


def cross_entropy_sum(
    hidden_states: jax.Array, table: jax.Array, targets: jax.Array, weights: jax.Array, chunk: int
) -> jax.Array:
    """Weighted sum over supervised positions of -log p(target), in float32.

    Each row's supervised positions are moved to its front, then `chunk` positions of every row are
    projected at a time until no row has any left: memory is [B, C, V], and work follows the number
    of supervised positions. Gradients are computed with the loss, so no logits are kept or
    recomputed for the backward pass.

    Args:
      hidden_states: [B, T, D].
      table: output embedding [V, D].
      targets: int[B, T] from `next_token_targets`.
      weights: float32 [B], of each row; no gradient is taken of them.
      chunk: positions of each row in one piece.
    """
    hidden_states, targets, chunk = _front_loaded(hidden_states, targets, chunk)
    weights = jnp.broadcast_to(weights[:, None], targets.shape)
    with jax.named_scope("cross_entropy"):
        return _front_loaded_sum(hidden_states, table, targets, weights, chunk)


def _front_loaded(hidden_states, targets, chunk: int, *more: jax.Array) -> tuple:
    """Supervised positions at the front of their rows, which are padded to whole chunks.

    Returns:
      hidden_states, targets, the chunk, no longer than a row, and each of `more`, [B, T].
    """
    length = hidden_states.shape[1]
    chunk = min(chunk, length)
    padding = -length % chunk
    order, rank = front_order(targets != IGNORE_INDEX)
    targets, *more = (jnp.take_along_axis(x, order, axis=1) for x in (targets, *more))
    hidden_states = take_rows(hidden_states, order, rank, every=True)
    behind = ((0, 0), (0, padding))
    targets = jnp.pad(targets, behind, constant_values=IGNORE_INDEX)
    hidden_states = jnp.pad(hidden_states, (*behind, (0, 0)))
    return hidden_states, targets, chunk, *(jnp.pad(x, behind) for x in more)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _front_loaded_sum(hidden_states, table, targets, weights, chunk):
    return _sum_and_grads(hidden_states, table, targets, weights, chunk, False, False)[0]


def _split_axes() -> tuple[str, ...]:
    """The axes of the mesh that rows are split over here."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(
        axis for axis in BATCH_AXES if mesh.shape.get(axis, 1) > 1 and axis not in mesh.manual_axes
    )


def _sum_and_grads(
    hidden_states, table, targets, weights, chunk, want_hidden: bool, want_table: bool
):
    """The loss sum and its gradients (None if not wanted); each device handles its own rows.

    Under a mesh, each device gets the whole table once, in the dtype of the products, and the sums
    are reduced once at the end. The compiler by itself would do both for every chunk.

    Args:
      weights: float32 [B, T], of each position.
    """
    run = functools.partial(
        _local_sum_and_grads, chunk=chunk, want_hidden=want_hidden, want_table=want_table
    )
    mesh, axes = jax.sharding.get_abstract_mesh(), _split_axes()
    if not axes:
        return run(hidden_states, table, targets, weights)
    scatter = "fsdp" in axes and table.shape[1] % mesh.shape["fsdp"] == 0

    def on_a_device(hidden_states, table, targets, weights):
        longest = jax.lax.pmax(longest_row(targets), axes)
        total, d_hidden, d_table = run(hidden_states, table, targets, weights, longest=longest)
        if want_table and scatter:
            d_table = jax.lax.psum_scatter(d_table, "fsdp", scatter_dimension=1, tiled=True)
        others = tuple(axis for axis in axes if not (scatter and axis == "fsdp"))
        if want_table and others:
            d_table = jax.lax.psum(d_table, others)
        return jax.lax.psum(total, axes), d_hidden, d_table

    rows, whole = PartitionSpec(axes), PartitionSpec()
    sharded = jax.shard_map(
        on_a_device,
        in_specs=(rows, whole, rows, rows),
        out_specs=(whole, rows, PartitionSpec(None, "fsdp") if scatter else whole),
        axis_names=set(axes),
        check_vma=False,
    )
    return sharded(
        hidden_states, table.astype(product_dtype(hidden_states.dtype)), targets, weights
    )


def longest_row(targets: jax.Array) -> jax.Array:
    """The largest number of supervised positions in a row of int[B, T]."""
    return jnp.max(jnp.sum(targets != IGNORE_INDEX, axis=1))


def _chunk_of(start, chunk: int, *arrays: jax.Array) -> list[jax.Array]:
    return [jax.lax.dynamic_slice_in_dim(array, start, chunk, axis=1) for array in arrays]


def _logits_of(h: jax.Array, table: jax.Array, targets: jax.Array) -> tuple[jax.Array, ...]:
    """Logits [B, C, V], their logsumexp and that of the target, [B, C], of h [B * C, D]."""
    logits = product(h, table, (1,), (1,), jnp.float32).reshape(*targets.shape, -1)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    at_target = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    return logits, log_z, at_target


def _local_sum_and_grads(
    hidden_states, table, targets, weights, chunk, want_hidden, want_table, longest=None
):
    """`_sum_and_grads` of the rows of one device, chunk by chunk up to the `longest` row's end."""
    longest = longest_row(targets) if longest is None else longest

    def piece(state):
        start, total, d_hidden, d_table = state
        h, t, w = _chunk_of(start, chunk, hidden_states, targets, weights)
        h = h.reshape(-1, h.shape[-1])
        logits, log_z, at_target = _logits_of(h, table, t)
        weight = jnp.where(t != IGNORE_INDEX, w, 0.0)  # [B, C]
        total += jnp.sum(weight * (log_z - at_target))
        if want_hidden or want_table:
            d_logits = jnp.exp(logits - log_z[..., None])
            d_logits -= jax.nn.one_hot(t, logits.shape[-1], dtype=jnp.float32)
            d_logits = (weight[..., None] * d_logits).astype(h.dtype).reshape(len(h), -1)
        if want_hidden:
            d_h = product(d_logits, table, (1,), (0,), h.dtype).reshape(*t.shape, -1)
            d_hidden = jax.lax.dynamic_update_slice_in_dim(d_hidden, d_h, start, axis=1)
        if want_table:
            d_table += product(d_logits, h, (0,), (0,), jnp.float32)
        return start + chunk, total, d_hidden, d_table

    start = (
        jnp.int32(0),
        jnp.float32(0),
        jnp.zeros_like(hidden_states) if want_hidden else None,
        jnp.zeros(table.shape, jnp.float32) if want_table else None,
    )
    _, total, d_hidden, d_table = jax.lax.while_loop(lambda s: s[0] < longest, piece, start)
    return total, d_hidden, d_table


def _forward(hidden_states, table, targets, weights, chunk):
    # A frozen output projection (stage 1) gets no gradient, and none is computed.
    total, d_hidden, d_table = _sum_and_grads(
        hidden_states.value,
        table.value,
        targets.value,
        weights.value,
        chunk,
        hidden_states.perturbed,
        table.perturbed,
    )
    # dtype travels as an empty array: residuals must be arrays.
    return total, (d_hidden, d_table, jnp.zeros((0,), table.value.dtype))


def _backward(chunk, residuals, cotangent):
    d_hidden, d_table, table_like = residuals
    if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
        return None, None, None, None
    if d_hidden is not None:
        d_hidden = d_hidden * cotangent.astype(d_hidden.dtype)
    if d_table is not None:
        d_table = (d_table * cotangent).astype(table_like.dtype)
    return d_hidden, d_table, None, None


_front_loaded_sum.defvjp(_forward, _backward, symbolic_zeros=True)


def answer_log_probs(
    hidden_states: jax.Array,
    table: jax.Array,
    targets: jax.Array,
    answers: jax.Array,
    count: int,
    chunk: int,
) -> jax.Array:
    """log p of each answer in a row: the sum over its supervised positions, in float32.

    As in `cross_entropy_sum` no more than [B, C, V] logits exist at once. Their weights in a
    gradient are known only when all sums are, so the backward pass computes the logits again.

        targets  5 _ 6 7 _     answers  0 0 0 1 0     sums  log p(5) + log p(6), log p(7)

    Args:
      hidden_states, table, targets, chunk: as in `cross_entropy_sum`.
      answers: int[B, T], the number of the answer that each supervised position belongs to.
      count: A, more than any of these numbers.

    Returns:
      float32 [B, A], 0 for a number that no position has.
    """
    loaded = _front_loaded(hidden_states, targets, chunk, answers)
    hidden_states, targets, chunk, answers = loaded
    with jax.named_scope("log_probs"):
        return _front_loaded_log_probs(hidden_states, table, targets, answers, count, chunk)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _front_loaded_log_probs(hidden_states, table, targets, answers, count, chunk):
    run = functools.partial(_local_log_probs, count=count, chunk=chunk)
    axes = _split_axes()
    if not axes:
        return run(hidden_states, table, targets, answers)

    def on_a_device(hidden_states, table, targets, answers):
        longest = jax.lax.pmax(longest_row(targets), axes)
        return run(hidden_states, table, targets, answers, longest=longest)

    rows, whole = PartitionSpec(axes), PartitionSpec()
    sharded = jax.shard_map(
        on_a_device,
        in_specs=(rows, whole, rows, rows),
        out_specs=rows,
        axis_names=set(axes),
        check_vma=False,
    )
    table = table.astype(product_dtype(hidden_states.dtype))
    return sharded(hidden_states, table, targets, answers)


def _local_log_probs(hidden_states, table, targets, answers, count, chunk, longest=None):
    """`answer_log_probs` of the rows of one device."""
    longest = longest_row(targets) if longest is None else longest

    def piece(state):
        start, sums = state
        h, t, a = _chunk_of(start, chunk, hidden_states, targets, answers)
        _, log_z, at_target = _logits_of(h.reshape(-1, h.shape[-1]), table, t)
        mine = (a[..., None] == jnp.arange(count)) & (t != IGNORE_INDEX)[..., None]  # [B, C, A]
        sums += jnp.sum(jnp.where(mine, (at_target - log_z)[..., None], 0.0), axis=1)
        return start + chunk, sums

    start = jnp.int32(0), jnp.zeros((len(targets), count), jnp.float32)
    return jax.lax.while_loop(lambda s: s[0] < longest, piece, start)[1]


def _log_probs_forward(hidden_states, table, targets, answers, count, chunk):
    values = [x.value for x in (hidden_states, table, targets, answers)]
    # What is needed backward travels as an array or as None: residuals hold no flags.
    wanted = tuple(jnp.zeros(0) if x.perturbed else None for x in (hidden_states, table))
    return _front_loaded_log_probs(*values, count, chunk), (values, wanted)


def _log_probs_backward(count, chunk, residuals, cotangent):
    (hidden_states, table, targets, answers), wanted = residuals
    if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
        return None, None, None, None
    weights = -jnp.take_along_axis(cotangent, answers, axis=1)
    wants = [x is not None for x in wanted]
    with jax.named_scope("log_probs"):
        _, d_hidden, d_table = _sum_and_grads(hidden_states, table, targets, weights, chunk, *wants)
    return d_hidden, d_table if d_table is None else d_table.astype(table.dtype), None, None


_front_loaded_log_probs.defvjp(_log_probs_forward, _log_probs_backward, symbolic_zeros=True)
