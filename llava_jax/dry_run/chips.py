"""What each kind of TPU and GPU can do, for the roofline and for the compilers.

TPUs: the vendor's pages (https://docs.cloud.google.com/tpu/docs) and "How to Scale Your Model"
(https://jax-ml.github.io/scaling-book), whose convention for link bandwidths is kept; memory as the
compiler of libtpu 0.0.42 counts it. GPUs: NVIDIA's data sheets and the descriptions in XLA's source
(xla/backends/gpu/target_config/specs), of the cards with NVLink (SXM); networks are those of
NVIDIA's DGX machines.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np

from llava_jax.training.flops import peak_flops

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a device of JAX has.

    Attributes:
      kind: as JAX reports it, and a GPU's driver.
      hbm: bytes of memory.
      hbm_bandwidth: bytes/s.
      link: bytes/s, one way: of a TPU's link to a neighbour, of all links of a GPU.
      network: bytes/s of a host's network cards, one way: the share of a device.
    """

    kind: str
    hbm: int
    hbm_bandwidth: float
    link: float
    network: float

    @property
    def peak(self) -> float:
        """Dense bfloat16 FLOP/s of a device."""
        return peak_flops(self.kind)


@dataclasses.dataclass(frozen=True)
class Tpu(Chip):
    """A TPU, joined to its neighbours in a torus.

    Attributes:
      clock: cycles/s of its cores.
      ring: the axis size from which an axis closes to a ring.
      cube: axes close only together.
      devices: of JAX on a chip, which share its links.
      options: further arguments of the compiler's description of a slice.
    """

    clock: float
    ring: int
    cube: bool = False
    devices: int = 1
    options: tuple[tuple[str, str], ...] = ()

    def bandwidth(self, shape: tuple[int, ...], members: Sequence[jax.Device]) -> float:
        """Bytes/s that enter a device when `members` gather along every axis of a slice.

        An axis that closes to a ring brings data from both sides, an open one from one side at its
        ends, for which the others wait. Chips with others between them, which gather among
        themselves, share the links, and so do devices of one chip in different groups. Infinite
        within a chip.

        Args:
          shape: chips along each axis of the slice.
        """
        closed = [size % self.ring == 0 for size in shape]
        if self.cube:
            closed = [all(closed)] * len(closed)
        ways, places = 0.0, np.array([device.coords for device in members])
        for axis, size in enumerate(shape):
            along = np.unique(places[:, axis])
            if len(along) > 1:
                ways += (2 if closed[axis] and len(along) == size else 1) / (along[1] - along[0])
        of_a_chip = len(places) / len(np.unique(places, axis=0))
        return self.link * ways * of_a_chip / self.devices or math.inf


@dataclasses.dataclass(frozen=True)
class Gpu(Chip):
    """An NVIDIA GPU, joined to the others of its host by switches.

    Attributes:
      capability: CUDA compute capability.
      cores: streaming multiprocessors.
      fpus: float32 units of a core.
      shared: bytes of a core's shared memory.
      cache: bytes of the L2 cache.
      clock: GHz.
      links: NVLinks.
    """

    capability: str
    cores: int
    fpus: int
    shared: int
    cache: int
    clock: float
    links: int

    def bandwidth(self, shape: tuple[int, ...], members: Sequence[jax.Device]) -> float:
        """Bytes/s that enter a card when `members` gather; infinite for one card.

        Within a host every card takes its NVLinks' whole rate. Between hosts the cards of a host
        that take part divide what their share of the network brings.

        Args:
          shape: not used: a switch has no axes.
        """
        del shape
        hosts = {device.process_index for device in members}
        if len(members) == 1:
            return math.inf
        if len(hosts) == 1:
            return self.link
        return min(self.link, self.network * len(members) / len(hosts))


MEGACORE = (("chip_config_name", "megacore"),)  # a v4 chip's two cores as one device
CHIPS: dict[str, Tpu | Gpu] = {
    # kind, hbm, hbm_bandwidth, link, network, clock, ring
    # v4's network is not published: v5p's.
    "v4": Tpu(
        "TPU v4", int(30.75 * GIB), 1.23e12, 4.5e10, 6.25e9, 1.05e9, 4, True, options=MEGACORE
    ),
    "v5e": Tpu("TPU v5 lite", int(15.75 * GIB), 0.82e12, 4.5e10, 3.125e9, 1.5e9, 16),
    "v5p": Tpu("TPU v5", int(95.74 * GIB), 2.76e12, 9e10, 6.25e9, 1.75e9, 4, True),
    "v6e": Tpu("TPU v6 lite", int(31.25 * GIB), 1.64e12, 9e10, 12.5e9, 1.75e9, 16),
    # A device is half a chip. The clock is the peak over what four products units of 256 x 256 do.
    "tpu7x": Tpu("TPU7x", int(94.74 * GIB), 3.69e12, 9e10, 6.25e9, 2.2e9, 4, True, devices=2),
    # kind, hbm, hbm_bandwidth, link, network; then as in `Gpu`
    "a100": Gpu(
        "NVIDIA A100-SXM4-80GB", 85_100_068_864, 2.04e12, 3e11, 2.5e10,
        "8.0", 108, 64, 167_936, 41_943_040, 1.41, 12,
    ),
    "h100": Gpu(
        "NVIDIA H100 80GB HBM3", 84_942_979_072, 3.35e12, 4.5e11, 5e10,
        "9.0", 132, 128, 233_472, 52_428_800, 1.98, 18,
    ),
    "h200": Gpu(
        "NVIDIA H200", 151_397_597_184, 4.8e12, 4.5e11, 5e10,
        "9.0", 132, 128, 233_472, 52_428_800, 1.98, 18,
    ),
    "b200": Gpu(
        "NVIDIA B200", 191_514_411_008, 7.67e12, 9e11, 5e10,
        "10.0", 148, 128, 233_472, 132_644_864, 1.965, 18,
    ),
}  # fmt: skip
