"""The device mesh: axes `data`, `fsdp` and `tensor`."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from llava_jax.errors import LlavaError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")  # rows of a batch are split over both


def make_mesh(data: int = 1, fsdp: int = -1, tensor: int = 1, devices=None) -> Mesh:
    """A mesh over all devices; one axis may be -1 and takes what the others leave.

    Raises:
      LlavaError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    if sizes.count(-1) == 1:
        rest = int(np.prod([s for s in sizes if s != -1]))
        sizes[sizes.index(-1)] = len(devices) // rest if rest else 0
    if min(sizes) < 1 or np.prod(sizes) != len(devices):
        raise LlavaError(
            f"mesh data={data}, fsdp={fsdp}, tensor={tensor} does not fit {len(devices)} devices: "
            "the sizes must multiply to that number (one of them may be -1)"
        )
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def microbatches(mesh: Mesh, rows: int, wanted: int) -> int:
    """Parts that a batch of `rows` is cut into: `wanted`, or the most that suit every device.

    A part has as many rows for each device that shares the batch, and one at least.

    Raises:
      LlavaError: `rows` cannot be split evenly over those devices.
    """
    shards = int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))
    if rows % shards:
        raise LlavaError(
            f"a batch of {rows} rows cannot be split over {shards} devices "
            f"(data={mesh.shape['data']} x fsdp={mesh.shape['fsdp']}): "
            f"make config.batch_size a multiple of {shards}"
        )
    a_device = rows // shards
    return max(n for n in range(1, min(wanted, a_device) + 1) if a_device % n == 0)
