"""Parameters and the state of generation on a device mesh.

Parameters are spread by the rules of training, rows over data and fsdp, kv heads over tensor.
"""

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llava_jax.inference.decoding import DecodeState
from llava_jax.models.llava import LlavaConfig, abstract_params
from llava_jax.parallel.mesh import BATCH_AXES
from llava_jax.parallel.sharding import param_shardings, put

_KEYS = (None, BATCH_AXES, "tensor", None, None)  # [L, B, K, S, H]
_SCALES = (None, None, BATCH_AXES, "tensor", None)  # [2, L, B, K, S]
_ROWS = (BATCH_AXES,)  # [B, ...]


def place_params(config: LlavaConfig, params: dict, mesh: Mesh, dtype: str) -> dict:
    """Parameters on their devices, each of which is given its part only.

    params: leaves have a shape and give arrays for slices; see `sharding.put`.
    """
    shardings = flatten_dict(param_shardings(mesh, abstract_params(config)))
    flat = flatten_dict(params, keep_empty_nodes=True)
    return unflatten_dict(
        {
            path: put(leaf, shardings[path], jnp.dtype(dtype)) if path in shardings else leaf
            for path, leaf in flat.items()
        }
    )


def place_state(state: DecodeState, mesh: Mesh) -> DecodeState:
    """Puts it there, or inside a compiled function keeps it there.

    What does not divide evenly is replicated.
    """

    def spread(leaf, axes):
        spec = [
            axis if axis and size % _devices(mesh, axis) == 0 else None
            for axis, size in zip(axes, leaf.shape, strict=False)
        ]
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, PartitionSpec(*spec)))

    cache = state.cache  # on a mesh, of all layers
    scales = None if cache.scales is None else spread(cache.scales, _SCALES)
    placed = jax.tree.map(lambda leaf: spread(leaf, _ROWS), state.replace(cache=None))
    return placed.replace(
        cache=cache.replace(
            keys=spread(cache.keys, _KEYS),
            values=spread(cache.values, _KEYS),
            scales=scales,
        )
    )


def _devices(mesh: Mesh, axis: str | tuple[str, ...]) -> int:
    """How many devices an axis, or several together, are split over."""
    size = 1
    for name in (axis,) if isinstance(axis, str) else axis:
        size *= mesh.shape[name]
    return size
