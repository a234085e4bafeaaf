"""Devices that are not there: chips of a TPU pod by its topology's name, or simulated CPUs.

What a chip can do is taken from the vendors' pages and from "How to Scale Your Model"
(https://jax-ml.github.io/scaling-book), whose convention for link bandwidths is kept.
"""

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Iterable

import jax
import numpy as np

from llava_jax.errors import LlavaError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of TPU.

    Attributes:
      hbm: bytes that a program may use, as the compiler counts them.
      peak: dense bfloat16 FLOP/s.
      clock: cycles/s of its cores.
      hbm_bandwidth: bytes/s.
      link: bytes/s of one link between neighbours, one way.
      ring: the axis size from which an axis closes to a ring.
      network: bytes/s between slices, one way: a chip's share of its host's network cards.
    """

    hbm: int
    peak: float
    clock: float
    hbm_bandwidth: float
    link: float
    ring: int
    network: float


CHIPS = {
    "v5e": Chip(int(15.75 * GIB), 197e12, 1.5e9, 0.82e12, 4.5e10, 16, 3.125e9),
    "v5p": Chip(int(95.74 * GIB), 459e12, 1.75e9, 2.76e12, 9e10, 4, 6.25e9),
    "v6e": Chip(int(31.25 * GIB), 918e12, 1.75e9, 1.64e12, 9e10, 16, 12.5e9),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A set of devices to compile for.

    Attributes:
      name: as given, such as `v5e:4x4`, `2xv5e:4x4` or `cpu:8`.
      shape: chips along each axis of a slice's torus.
      chip: None for CPUs.
      slices: that have a torus each; the hosts' network joins them.
    """

    name: str
    devices: tuple[jax.Device, ...]
    shape: tuple[int, ...]
    chip: Chip | None
    slices: int = 1

    def bandwidth(self, devices: Iterable[jax.Device]) -> float:
        """Bytes/s that enter a chip when these chips of a slice gather along every axis.

        An axis that closes to a ring brings data from both sides, an open one from one side at
        its ends, for which the others wait. Chips with others between them, which gather among
        themselves, share the links. Infinite for one chip.
        """
        closed = [size % self.chip.ring == 0 for size in self.shape]
        if self.chip is CHIPS["v5p"]:  # closes its axes only together
            closed = [all(closed)] * len(closed)
        ways, places = 0.0, np.array([device.coords for device in devices])
        for axis, size in enumerate(self.shape):
            along = np.unique(places[:, axis])
            if len(along) > 1:
                ways += (2 if closed[axis] and len(along) == size else 1) / (along[1] - along[0])
        return self.chip.link * ways or math.inf


def topology(name: str) -> Topology:
    """The devices of a name: `KIND:AxB` or `KIND:AxBxC` for a TPU, `cpu:N` for simulated CPUs.

    `NxKIND:AxB` are N such slices of TPUs. To be called before anything else asks JAX for its
    devices.

    Raises:
      LlavaError: no such topology, or the TPU compiler is not installed.
    """
    found = re.fullmatch(r"(?:([1-9]\d*)x)?([a-z]\w*):([1-9]\d*(?:x[1-9]\d*)*)", name)
    slices, kind, sizes = found.groups() if found else (None, None, "")
    shape = tuple(map(int, filter(None, sizes.split("x"))))
    if kind not in (*CHIPS, "cpu") or kind == "cpu" and (slices or len(shape) > 1):
        raise LlavaError(
            f"dry_run={name!r} is no topology: give cpu:8, or one of {', '.join(CHIPS)} with its "
            "chips, such as v5e:4x4 or v5p:4x4x4, or several such slices: 2xv5e:4x4"
        )
    jax.config.update("jax_platforms", "cpu")
    if kind == "cpu":
        return Topology(name, _simulated_cpus(shape[0]), shape, None)
    slices = int(slices or 1)
    devices = _tpu_devices(name, f"{kind}:{sizes}", shape, slices)
    return Topology(name, devices, shape, CHIPS[kind], slices)


def _simulated_cpus(count: int) -> tuple[jax.Device, ...]:
    # Read when JAX first looks for devices; of two, the last one counts.
    option = f"--xla_force_host_platform_device_count={count}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {option}"
    devices = jax.devices()[:count]
    if len(devices) < count:
        raise LlavaError(f"dry_run=cpu:{count}: this process already has {len(devices)} devices")
    return tuple(devices)


def _tpu_devices(
    name: str, one_slice: str, shape: tuple[int, ...], slices: int
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
        )
    except jax.errors.JaxRuntimeError as error:
        raise LlavaError(
            f"dry_run={name}: the TPU compiler knows no such slice ({error})"
        ) from None
    return tuple(description.devices)
