"""Meshes that fit the devices, and batches that fit the mesh."""

import dataclasses

import jax
import pytest

from llava_jax.errors import LlavaError
from llava_jax.parallel.mesh import device_grid, make_mesh, microbatches, slice_count


@pytest.mark.parametrize(
    "sizes, shape",
    [
        ({}, (1, 8, 1)),
        ({"data": 2}, (2, 4, 1)),
        ({"data": -1, "fsdp": 2, "tensor": 2}, (2, 2, 2)),
        ({"data": 4, "fsdp": 1, "tensor": -1}, (4, 1, 2)),
        ({"data": 8, "fsdp": 1}, (8, 1, 1)),
    ],
)
def test_one_axis_takes_what_the_others_leave(sizes, shape):
    mesh = make_mesh(**sizes)
    assert tuple(mesh.shape.values()) == shape and mesh.axis_names == ("data", "fsdp", "tensor")


@pytest.mark.parametrize(
    "sizes",
    [
        {"data": 3},
        {"data": 16},
        {"fsdp": 4},
        {"data": 0},
        {"data": -1, "fsdp": -1},
        {"data": -1, "fsdp": 0},
        {"data": -2, "fsdp": -4},
    ],
)
def test_a_mesh_that_does_not_fit_names_the_numbers(sizes):
    with pytest.raises(LlavaError, match="mesh data=.* does not fit 8 devices: the sizes must mul"):
        make_mesh(**sizes)


def test_a_mesh_of_some_devices():
    assert make_mesh(devices=jax.devices()[:2]).size == 2


@dataclasses.dataclass(frozen=True)
class Chip:
    """As much of a TPU device as laying out a mesh asks for."""

    id: int
    coords: tuple[int, int, int]
    slice_index: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v6 lite"
    core_on_chip: int = 0
    process_index: int = 0


def chips(slices: int, side: int) -> list[Chip]:
    """Squares of chips."""
    places = [(s, x, y) for s in range(slices) for x in range(side) for y in range(side)]
    return [Chip(i, (x, y, 0), s) for i, (s, x, y) in enumerate(places)]


def test_only_the_data_axis_crosses_slices():
    grid = device_grid([4, 2, 1], chips(2, 2)[::-1])
    assert grid.shape == (4, 2, 1)
    assert [{c.slice_index for c in part.flat} for part in grid] == [{0}, {0}, {1}, {1}]
    with pytest.raises(LlavaError, match="data=1 does not spread over 2 TPU slices: .*mesh.data=2"):
        device_grid([1, 8, 1], chips(2, 2))


@pytest.mark.parametrize("slices", [1, 2])
def test_an_axis_may_be_a_part_of_one_of_the_torus(slices):
    grid = device_grid([slices, 8, 2], chips(slices, 4))
    assert len({c.id for c in grid.flat}) == 16 * slices
    for one, other in grid.reshape(-1, 2):  # partners on the tensor axis are neighbours
        assert sum(abs(a - b) for a, b in zip(one.coords, other.coords, strict=True)) == 1


def test_slices_are_those_of_tpus():
    assert slice_count(chips(2, 2)) == 2
    assert slice_count([dataclasses.replace(c, platform="gpu") for c in chips(2, 2)]) == 1
    assert slice_count(jax.devices()) == 1


def test_rows_are_shared_by_data_and_fsdp_and_not_by_tensor():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    assert microbatches(mesh, 12, 1) == 1
    message = r"6 rows cannot be split over 4 devices \(data=2 x fsdp=2\): .* a multiple of 4"
    with pytest.raises(LlavaError, match=message):
        microbatches(mesh, 6, 1)


@pytest.mark.parametrize("wanted, cut", [(1, 1), (2, 2), (3, 3), (4, 3), (5, 3), (6, 6), (99, 6)])
def test_a_microbatch_has_equal_rows_for_every_device(wanted, cut):
    assert microbatches(make_mesh(data=2, tensor=2), 24, wanted) == cut  # 6 rows a device
