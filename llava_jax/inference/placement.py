"""The state of generation on a device mesh: rows over data and fsdp, kv heads over tensor."""

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llava_jax.inference.decoding import DecodeState
from llava_jax.parallel.mesh import BATCH_AXES

_KEYS = (None, BATCH_AXES, None, "tensor", None)  # [L, B, S, K, H]
_SCALES = (None, None, BATCH_AXES, None, "tensor")  # [2, L, B, S, K]
_ROWS = (BATCH_AXES,)  # [B, ...]


def place_state(state: DecodeState, mesh: Mesh) -> DecodeState:
    """Puts it there, or inside a compiled function keeps it there.

    What does not divide evenly is replicated.
    """

    def put(leaf, axes):
        spec = [
            axis if axis and size % _devices(mesh, axis) == 0 else None
            for axis, size in zip(axes, leaf.shape, strict=False)
        ]
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, PartitionSpec(*spec)))

    cache = state.cache
    scales = None if cache.scales is None else put(cache.scales, _SCALES)
    placed = jax.tree.map(lambda leaf: put(leaf, _ROWS), state.replace(cache=None))
    return placed.replace(
        cache=cache.replace(
            keys=put(cache.keys, _KEYS),
            values=put(cache.values, _KEYS),
            scales=scales,
        )
    )


def _devices(mesh: Mesh, axis: str | tuple[str, ...]) -> int:
    """How many devices an axis, or several together, are split over."""
    size = 1
    for name in (axis,) if isinstance(axis, str) else axis:
        size *= mesh.shape[name]
    return size
