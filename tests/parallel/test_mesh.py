"""Meshes that fit the devices, and batches that fit the mesh."""

import jax
import pytest

from llava_jax.errors import LlavaError
from llava_jax.parallel.mesh import make_mesh, microbatches


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


def test_rows_are_shared_by_data_and_fsdp_and_not_by_tensor():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    assert microbatches(mesh, 12, 1) == 1
    message = r"6 rows cannot be split over 4 devices \(data=2 x fsdp=2\): .* a multiple of 4"
    with pytest.raises(LlavaError, match=message):
        microbatches(mesh, 6, 1)


@pytest.mark.parametrize("wanted, cut", [(1, 1), (2, 2), (3, 3), (4, 3), (5, 3), (6, 6), (99, 6)])
def test_a_microbatch_has_equal_rows_for_every_device(wanted, cut):
    assert microbatches(make_mesh(data=2, tensor=2), 24, wanted) == cut  # 6 rows a device
