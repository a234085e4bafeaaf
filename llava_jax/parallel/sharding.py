"""The one table from logical axis names to mesh axes, and shardings made with it."""

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import empty_node, flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llava_jax.errors import LlavaError
from llava_jax.parallel.mesh import BATCH_AXES

# An axis that does not divide evenly is replicated (see `param_shardings`).
RULES = (
    # weights
    ("vocab", "tensor"),
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
    ("projector_out", "fsdp"),
    ("vision_embed", "fsdp"),
    ("vision_heads", "tensor"),
    ("vision_mlp", "tensor"),
    ("lora_rank", None),
    ("layers", None),
    ("norm", None),
    ("head_dim", None),
    ("vision_embed_norm", None),
    ("vision_patch", None),
    ("vision_positions", None),
    # activations
    ("batch", BATCH_AXES),
    ("length", None),
    ("act_embed", None),
    ("act_heads", "tensor"),
    ("act_mlp", "tensor"),
)
# The rules within one part of the data axis, for steps that run part by part.
RULES_OF_A_PART = tuple((name, "fsdp" if axis == BATCH_AXES else axis) for name, axis in RULES)


def param_shardings(mesh: Mesh, boxed_params) -> dict:
    """NamedSharding of each parameter, from the logical names that its initialiser gave it.

    Args:
      boxed_params: `abstract_params(config)`: leaves boxed with logical axis names.
    """
    rules = dict(RULES)

    def shard(box) -> NamedSharding:
        spec, used = [], set()
        for name, size in zip(box.names, box.value.shape, strict=True):
            axis = rules[name]
            fits = axis is not None and axis not in used and size % mesh.shape[axis] == 0
            spec.append(axis if fits else None)
            used.add(spec[-1])
        return NamedSharding(mesh, PartitionSpec(*spec))

    is_box = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)
    return jax.tree.map(shard, boxed_params, is_leaf=is_box)


def quantized_shardings(shardings: dict, params: dict) -> dict:
    """`param_shardings` with those of what stands next to a quantized kernel (quantization.py).

    Scales and zero points are where their part of the kernel is. A kernel's order is that of all
    inputs, and whole on each device.

    Args:
      params: the parameters, or their shapes.
    """
    known = flatten_dict(shardings)

    def shard(path: tuple[str, ...], leaf) -> NamedSharding:
        if path in known or leaf is empty_node:
            return known.get(path, leaf)
        kernel = known[*path[:-1], "kernel"]
        *outer, into, out = kernel.spec
        if path[-1] == "kernel_order":
            return NamedSharding(kernel.mesh, PartitionSpec(*outer))
        fits = into is not None and leaf.shape[-2] % kernel.mesh.shape[into] == 0
        return NamedSharding(kernel.mesh, PartitionSpec(*outer, into if fits else None, out))

    flat = flatten_dict(params, keep_empty_nodes=True)
    return unflatten_dict({path: shard(path, leaf) for path, leaf in flat.items()})


def shards_of_inputs(shardings: dict) -> dict[tuple[str, ...], int]:
    """Path of a kernel [..., in, out] -> the parts that its inputs are cut into."""
    kernels = {p: s for p, s in flatten_dict(shardings).items() if p[-1] == "kernel"}
    return {p: s.mesh.shape[s.spec[-2]] if s.spec[-2] else 1 for p, s in kernels.items()}


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over the data and fsdp axes."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def put(leaf, sharding: NamedSharding, dtype) -> jax.Array:
    """Puts a host array on the devices, cast to `dtype`; each gets only its slice.

    Args:
      leaf: an array, a number, or a LazyParameter, of which only this process's slices are read.
    """
    if isinstance(leaf, jax.Array | int | float):
        leaf = np.asarray(leaf)
    return jax.make_array_from_callback(
        leaf.shape, sharding, lambda index: leaf[index].astype(dtype)
    )


def process_part(mesh: Mesh) -> tuple[int, int]:
    """(index, count): the part of every batch that this process reads, of `count` equal parts.

    Processes whose devices hold the same rows (the tensor axis crosses hosts) read the same part.

    Raises:
      LlavaError: the layout of devices makes processes share only some of their rows.
    """
    shards = int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))
    places = batch_sharding(mesh).devices_indices_map((shards,))
    rows: dict[int, set[int]] = {}
    for device, (place,) in places.items():
        rows.setdefault(device.process_index, set()).add(place.start or 0)
    return equal_part(rows, jax.process_index())


def equal_part(rows: dict[int, set[int]], process: int) -> tuple[int, int]:
    """`process_part` for one of several processes, from the rows that each process holds."""
    parts = sorted({tuple(sorted(held)) for held in rows.values()})
    if sum(map(len, parts)) != len(set().union(*parts)) or len(set(map(len, parts))) > 1:
        raise LlavaError(
            f"the mesh spreads rows of a batch unevenly over {len(rows)} processes: make "
            "config.mesh.tensor divide the devices of a process, or be a multiple of them"
        )
    return parts.index(tuple(sorted(rows[process]))), len(parts)


def put_batch(mesh: Mesh, arrays: dict) -> dict:
    """This process's rows of a batch -> the global batch, rows split over the mesh."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, array)
        for name, array in arrays.items()
    }
