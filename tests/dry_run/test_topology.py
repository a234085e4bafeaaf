"""Topologies by name, their links, and names that mean none."""

import importlib.util
import itertools
import math
import types

import jax
import pytest

from llava_jax.dry_run.chips import CHIPS
from llava_jax.dry_run.topology import Topology, topology
from llava_jax.errors import LlavaError
from llava_jax.parallel.mesh import make_mesh


def test_simulated_cpus_have_no_chip():
    where = topology("cpu:8")
    assert where.devices == tuple(jax.devices()) and where.chip is None


@pytest.mark.parametrize(
    "name",
    [
        "v5e",
        "v5e:4x",
        "h100:2x4",
        "v100:8",
        "cpu:2x4",
        "v5e:0x4",
        "cpu:9",
        "0xv5e:2x2",
        "2xcpu:4",
        "x",
        "",
    ],
)
def test_names_that_mean_no_devices_are_refused(name):
    with pytest.raises(LlavaError, match="dry_run"):
        topology(name)


def test_every_chip_has_the_peak_of_its_kind():
    peaks = {name: chip.peak / 1e12 for name, chip in CHIPS.items()}
    tpus = {"v4": 275, "v5e": 197, "v5p": 459, "v6e": 918, "tpu7x": 1153.5}
    assert peaks == tpus | {"a100": 312, "h100": 989, "h200": 989, "b200": 2250}


def chips(*sizes: int, step: int = 1) -> list:
    """A block of chips, along the last axis every `step`th."""
    along = [
        range(0, size, step if axis == len(sizes) - 1 else 1) for axis, size in enumerate(sizes)
    ]
    return [types.SimpleNamespace(coords=coords) for coords in itertools.product(*along)]


@pytest.mark.parametrize(
    ("kind", "shape", "devices", "links"),
    [
        ("v5e", (4, 4), chips(4, 4), 2),  # open axes: one link each at the corners
        ("v5e", (16, 16), chips(16, 16), 4),
        ("v5e", (8, 16), chips(8, 16), 3),
        ("v5p", (4, 4, 4), chips(4, 4, 4), 6),
        ("v5p", (4, 4, 4), chips(4, 4, 1), 4),  # a plane of a cube
        ("v5p", (4, 4, 4), chips(1, 1, 2), 1),  # a part of a ring
        ("v5p", (4, 4, 4), chips(1, 1, 4, step=2), 1 / 2),  # two such pairs on one line
        ("v5p", (2, 2, 1), chips(2, 2, 1), 2),
        ("v6e", (8, 8), chips(8, 8), 2),
        ("v6e", (8, 8), chips(1, 1), math.inf),
        ("v4", (4, 4, 4), chips(4, 4, 4), 6),
        ("tpu7x", (2, 2, 1), chips(2, 2, 1) * 2, 2),  # both devices of every chip
        ("tpu7x", (2, 2, 1), chips(2, 2, 1), 1),  # one of each: the other takes half the links
        ("tpu7x", (2, 2, 1), chips(1, 1, 1) * 2, math.inf),  # a chip
    ],
)
def test_links_into_a_chip(kind, shape, devices, links):
    where = Topology(kind, tuple(devices), shape, CHIPS[kind])
    assert where.bandwidth(devices) == links * CHIPS[kind].link


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs the TPU compiler")
def test_a_slice_of_a_tpu():
    where = topology("v5e:2x4")
    assert len(where.devices) == 8 and where.devices[0].platform == "tpu"
    assert where.devices[0].device_kind == where.chip.kind
    with pytest.raises(LlavaError, match="no such slice"):
        topology("v5e:3x5")


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs the TPU compiler")
@pytest.mark.parametrize(
    ("name", "devices", "chips"),
    [("v4:2x2x1", 4, 4), ("v5p:2x2x1", 4, 4), ("v6e:2x2", 4, 4), ("tpu7x:2x2x1", 8, 4)],
)
def test_generations_of_tpus(name, devices, chips):
    where = topology(name)
    places = {tuple(device.coords) for device in where.devices}
    assert (len(where.devices), len(places)) == (devices, chips)
    assert where.devices[0].device_kind == where.chip.kind
    assert where.bandwidth(where.devices) == 2 * where.chip.link
    assert make_mesh(devices=list(where.devices)).size == devices


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs the TPU compiler")
def test_slices_of_a_tpu():
    where = topology("2xv5e:2x2")
    assert [d.slice_index for d in where.devices] == [0] * 4 + [1] * 4
    alone = topology("v5e:2x2")
    assert where.slices == 2
    assert where.bandwidth(where.devices[4:]) == alone.bandwidth(alone.devices)
