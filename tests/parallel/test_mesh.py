"""Meshes that fit the devices, and batches that fit the mesh."""

import dataclasses

import jax
import pytest

from llava_jax.errors import LlavaError
from llava_jax.parallel.mesh import hybrid_grid, make_mesh, microbatches, slice_count


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
    slice_index: int
    platform: str = "cpu"
    device_kind: str = "cpu"


def test_only_the_data_axis_crosses_slices():
    chips = [Chip(i, i // 4) for i in range(8)]
    grid = hybrid_grid([4, 2, 1], 2, chips[::-1])
    assert grid.shape == (4, 2, 1)
    assert [{c.slice_index for c in part.flat} for part in grid] == [{0}, {0}, {1}, {1}]
    with pytest.raises(LlavaError, match="data=1 does not spread over 2 TPU slices: .*mesh.data=2"):
        hybrid_grid([1, 8, 1], 2, chips)


def test_slices_are_those_of_tpus():
    assert slice_count([Chip(i, i // 4, "tpu") for i in range(8)]) == 2
    assert slice_count([Chip(i, i // 4, "gpu") for i in range(8)]) == 1
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
