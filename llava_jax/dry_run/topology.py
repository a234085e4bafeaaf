"""Devices that are not there: a TPU slice, NVIDIA GPUs, or simulated CPUs, by name."""

import dataclasses
import importlib.util
import os
import re
from collections.abc import Iterable

import jax

from llava_jax.dry_run.chips import CHIPS, Chip, Gpu, Tpu
from llava_jax.dry_run.gpu import gpu_devices, usable_share
from llava_jax.errors import LlavaError


@dataclasses.dataclass(frozen=True)
class Topology:
    """A set of devices to compile for.

    Attributes:
      name: as given, such as `v5e:4x4`, `2xv5e:4x4`, `h100:8` or `cpu:8`.
      shape: chips along each axis of a slice's torus; cards of a host.
      chip: what a device is; None for CPUs.
      slices: that have a torus each; the hosts' network joins them.
      share: of a device's memory that a program may use.
    """

    name: str
    devices: tuple[jax.Device, ...]
    shape: tuple[int, ...]
    chip: Chip | None
    slices: int = 1
    share: float = 1.0

    @property
    def usable(self) -> int | None:
        """Bytes of a device that a program may use; None for CPUs."""
        return self.chip and int(self.share * self.chip.hbm)

    def bandwidth(self, devices: Iterable[jax.Device]) -> float:
        """Bytes/s that enter a device when these devices of a slice gather."""
        return self.chip.bandwidth(self.shape, list(devices))


def topology(name: str) -> Topology:
    """The devices of a name.

    `KIND:AxB` or `KIND:AxBxC` is a slice of TPUs and `NxKIND:AxB` are N of them; `KIND:C` is a host
    with C GPUs and `NxKIND:C` are N of them; `cpu:N` are simulated CPUs. To be called before
    anything else asks JAX for its devices.

    Raises:
      LlavaError: no such topology, its compiler is not installed, or the variable that says how
        much of a card JAX takes is wrong.
    """
    found = re.fullmatch(r"(?:([1-9]\d*)x)?([a-z]\w*):([1-9]\d*(?:x[1-9]\d*)*)", name)
    count, kind, sizes = found.groups() if found else (None, None, "")
    shape = tuple(map(int, filter(None, sizes.split("x"))))
    chip = CHIPS.get(kind)
    if not (chip or kind == "cpu" and not count) or not isinstance(chip, Tpu) and len(shape) > 1:
        tpus, gpus = (
            ", ".join(k for k, chip in CHIPS.items() if isinstance(chip, maker))
            for maker in (Tpu, Gpu)
        )
        raise LlavaError(
            f"dry_run={name!r} is no topology: give cpu:8; or one of {tpus} with its chips, such "
            "as v5e:4x4 or v5p:4x4x4, or several such slices: 2xv5e:4x4; or one of "
            f"{gpus} with the cards of a host, such as h100:8, or several such hosts: 2xh100:8"
        )
    jax.config.update("jax_platforms", "cpu")
    if chip is None:
        return Topology(name, _simulated_cpus(shape[0]), shape, None)
    count = int(count or 1)
    if isinstance(chip, Gpu):
        share = usable_share()
        devices = gpu_devices(name, chip, count, shape[0])
        return Topology(name, devices, shape, chip, share=share)
    devices = _tpu_devices(name, chip, f"{kind}:{sizes}", shape, count)
    return Topology(name, devices, shape, chip, count)


def _simulated_cpus(count: int) -> tuple[jax.Device, ...]:
    # Read when JAX first looks for devices; of two, the last one counts.
    option = f"--xla_force_host_platform_device_count={count}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {option}"
    devices = jax.devices()[:count]
    if len(devices) < count:
        raise LlavaError(f"dry_run=cpu:{count}: this process already has {len(devices)} devices")
    return tuple(devices)


def _tpu_devices(
    name: str, chip: Tpu, one_slice: str, shape: tuple[int, ...], slices: int
) -> tuple[jax.Device, ...]:
    if not importlib.util.find_spec("libtpu"):
        raise LlavaError(
            f"dry_run={name} needs the TPU compiler: pip install -e '.[tpu]' in an environment of "
            "its own (no TPU is needed), or take --dry_run=cpu:8"
        )
    # Without this the compiler's library asks Google Cloud for a TPU that is not there.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # Else a second program that compiles for TPUs on this machine is refused.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    # A host has up to 2 x 2 chips of a slice; a smaller slice is a part of one.
    bounds = [min(size, 2) if axis < 2 else 1 for axis, size in enumerate((*shape, 1, 1)[:3])]
    try:
        description = topologies.get_topology_desc(
            platform="tpu",
            topology_name=one_slice,
            chips_per_host_bounds=bounds,
            num_slices=slices,
            **dict(chip.options),
        )
    except jax.errors.JaxRuntimeError as error:
        raise LlavaError(
            f"dry_run={name}: the TPU compiler knows no such slice ({error})"
        ) from None
    return tuple(description.devices)
