"""Parameters and the state of generation on a device mesh.

Each place on the data axis holds a copy of the model. A copy's parameters are spread by the rules
of training, its rows over fsdp, kv heads over tensor.
"""

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llava_jax.inference.decoding import DecodeState
from llava_jax.models.cache import KVCache
from llava_jax.models.llava import LlavaConfig, abstract_params
from llava_jax.parallel.sharding import param_shardings, put, replicated

_KEYS = (None, "fsdp", "tensor", None, None)  # [L, B, K, S, H]
_SCALES = (None, None, "fsdp", "tensor", None)  # [2, L, B, K, S]
_ROWS = ("fsdp",)  # [B, ...]


def copies(mesh: Mesh) -> list[Mesh]:
    """The devices of each copy of the model, as meshes of their own."""
    return [
        Mesh(mesh.devices[i : i + 1], mesh.axis_names, axis_types=mesh.axis_types)
        for i in range(mesh.shape["data"])
    ]


def copy_params(config: LlavaConfig, params: dict, mesh: Mesh) -> dict:
    """Parameters that are on some devices, on those of a mesh."""
    if mesh.size == 1:
        return jax.device_put(params, replicated(mesh))
    return jax.device_put(params, param_shardings(mesh, abstract_params(config)))


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
            axis if axis and size % mesh.shape[axis] == 0 else None
            for axis, size in zip(axes, leaf.shape, strict=False)
        ]
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, PartitionSpec(*spec)))

    def spread_cache(cache: KVCache) -> KVCache:
        scales = None if cache.scales is None else spread(cache.scales, _SCALES)
        return KVCache(spread(cache.keys, _KEYS), spread(cache.values, _KEYS), scales)

    placed = jax.tree.map(lambda leaf: spread(leaf, _ROWS), state.replace(cache=None))
    is_cache = lambda node: isinstance(node, KVCache)
    return placed.replace(cache=jax.tree.map(spread_cache, state.cache, is_leaf=is_cache))
