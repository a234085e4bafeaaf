"""The device mesh: axes `data`, `fsdp` and `tensor`."""

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from llava_jax.errors import LlavaError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")  # rows of a batch are split over both


def make_mesh(data: int = 1, fsdp: int = -1, tensor: int = 1, devices=None) -> Mesh:
    """A mesh over all devices; one axis may be -1 and takes the remaining devices.

    Raises:
      LlavaError: the sizes do not multiply to the number of devices, or `data` does not spread over
        the slices of a TPU multislice.
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
    return Mesh(device_grid(sizes, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def slice_count(devices) -> int:
    """TPU slices that the devices belong to; other devices count as one."""
    # The devices of a single slice may lack this attribute.
    return len({getattr(d, "slice_index", 0) for d in devices if d.platform == "tpu"}) or 1


def device_grid(sizes: list[int], devices) -> np.ndarray:
    """Devices [data, fsdp, tensor]; only `data` crosses the slow network between TPU slices.

    Within a slice an axis may be any part of the torus; `jax.make_mesh` allows that on v5e only.
    """
    data, *others = sizes
    slices = slice_count(devices)
    if slices == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    if data % slices:
        raise LlavaError(
            f"mesh data={data} does not spread over {slices} TPU slices: give "
            f"--config.mesh.data={slices}, or a multiple; gradients alone then cross between slices"
        )
    inside = (data // slices, *others)
    return mesh_utils.create_hybrid_device_mesh(
        inside, (slices, 1, 1), devices=devices, allow_split_physical_axes=True
    )


def microbatches(mesh: Mesh, rows: int, wanted: int) -> int:
    """Number of parts that a batch of `rows` is cut into: `wanted`, or the most that is possible.

    A part has the same number of rows for each device that shares the batch, and at least one.

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
