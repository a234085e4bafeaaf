"""How processes find each other, by their environment, and what must be the same in all."""

import os
import re
import subprocess
import sys
import time

import jax
import pytest

from llava_jax.errors import LlavaError
from llava_jax.parallel import hosts
from llava_jax.parallel.shares import Shard

SLURM = {
    "SLURM_JOB_ID": "7000123",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_NTASKS": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NUM_NODES": "1",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "1",
    "OMPI_COMM_WORLD_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}
START = """
import jax
from llava_jax.errors import LlavaError
from llava_jax.parallel import hosts
try:
    hosts.start()
    how = "joined" if jax.distributed.is_initialized() else "alone"
    print(how, jax.process_count(), "gpus:", jax.config.values["jax_cuda_visible_devices"])
except LlavaError as error:
    print("error:", error)
"""


@pytest.mark.parametrize(
    "surroundings, output",
    [
        ({}, "alone 1 gpus: all"),
        (SLURM, "joined 1 gpus: all"),
        (OPEN_MPI, "joined 1 gpus: all"),
        (POD, "alone 1 gpus: all"),
        (POD | {"JOB_COMPLETION_INDEX": "1"}, "error: this pod is one of a Kubernetes Job, but"),
        ({"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1234"}, "error: the processes of this run cannot"),
        (
            {"JAX_COORDINATOR_ADDRESS": "127.0.0.1"},
            "error: JAX_COORDINATOR_ADDRESS .* needs a port",
        ),
    ],
    ids=[
        *("laptop", "Slurm", "Open MPI", "pod", "Kubernetes without its package", "incomplete"),
        "no port",
    ],
)
def test_processes_are_found_by_their_surroundings(surroundings, output):
    marks = ("SLURM", "OMPI", "KUBERNETES", "JOB_", "JAX_COORDINATOR", "JAX_NUM", "JAX_PROCESS")
    plain = {k: v for k, v in os.environ.items() if not k.startswith(marks)}
    process = subprocess.run(
        [sys.executable, "-c", START],
        env=plain | surroundings | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert re.match(output, process.stdout.strip().splitlines()[-1]), process.stderr


@pytest.fixture
def surroundings(monkeypatch):
    """Sets the environment of a cluster, and notes what JAX is configured with."""
    marks = ("SLURM", "OMPI", "KUBERNETES", "JOB_", "JAX_", "TPU_", "CLOUD_TPU", "MEGASCALE")
    plain = {k: v for k, v in os.environ.items() if not k.startswith(marks)}
    settings = {}
    monkeypatch.setattr(jax.config, "update", settings.__setitem__)

    def become(values: dict) -> dict:
        monkeypatch.setattr(os, "environ", plain | values)
        return settings

    return become


TWO_PER_NODE = {"SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_STEP_NUM_NODES": "2"}
ONE_PER_NODE = {"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_STEP_NUM_NODES": "2"}
BY_HAND = {"JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "2"}


@pytest.mark.parametrize(
    "values, place, gpus",
    [
        ({}, None, None),
        (POD, None, None),
        (SLURM, None, None),
        (SLURM | ONE_PER_NODE, Shard(2, 2), None),
        (SLURM | TWO_PER_NODE | {"SLURM_LOCALID": "1"}, Shard(4, 4), "1"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "2"}, Shard(1, 2), None),
        (BY_HAND, Shard(3, 3), None),
        (BY_HAND | {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234"}, Shard(3, 3), None),
        (BY_HAND | {"JAX_LOCAL_DEVICE_IDS": "0,1"}, Shard(3, 3), "0,1"),
    ],
)
def test_a_process_that_joins_nobody_knows_its_place(values, place, gpus, surroundings):
    settings = surroundings(values)
    assert hosts.place() == place
    assert settings.get("jax_cuda_visible_devices") == gpus
    assert not jax.distributed.is_initialized()


def test_a_host_of_a_slice_uses_its_own_chips(surroundings):
    surroundings(BY_HAND | {"TPU_HOST_BOUNDS": "2,2,1", "MEGASCALE_NUM_SLICES": "2"})
    hosts.place()
    assert os.environ["TPU_PROCESS_BOUNDS"] == os.environ["TPU_HOST_BOUNDS"] == "1,1,1"
    assert os.environ["TPU_CHIPS_PER_PROCESS_BOUNDS"] == "2,2,1"
    assert "MEGASCALE_NUM_SLICES" not in os.environ
    surroundings(BY_HAND | {"TPU_PROCESS_BOUNDS": "2,1,1"})  # whoever sets it knows why
    hosts.place()
    assert os.environ["TPU_PROCESS_BOUNDS"] == "2,1,1" and "TPU_HOST_BOUNDS" not in os.environ
    surroundings({})
    assert hosts.place() is None and "TPU_PROCESS_BOUNDS" not in os.environ


@pytest.mark.parametrize(
    "values, message",
    [
        ({"JAX_NUM_PROCESSES": "2"}, "JAX_NUM_PROCESSES=2, JAX_PROCESS_ID=None: set both"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}, "which of them this is, from 0"),
        ({"JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"}, "JAX_NUM_PROCESSES is 'two': give"),
        (POD | {"JOB_COMPLETION_INDEX": "1"}, "this pod is one of a Kubernetes Job, but"),
    ],
)
def test_a_place_that_is_half_known_is_refused(values, message, surroundings):
    surroundings(values)
    with pytest.raises(LlavaError, match=message):
        hosts.place()


@pytest.mark.parametrize(
    "surroundings, alone",
    [
        ({}, False),
        ({"SLURM_NTASKS": "2", "SLURM_STEP_NUM_NODES": "2"}, True),
        ({"SLURM_NTASKS": "16", "SLURM_STEP_NUM_NODES": "2"}, False),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, True),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "8"}, False),
    ],
)
def test_a_process_alone_on_its_host_takes_all_gpus(surroundings, alone):
    assert hosts.alone_on_its_host(surroundings) == alone


def test_a_process_that_waits_says_so(monkeypatch, capsys):
    monkeypatch.setattr(hosts, "_PATIENCE", 0.01)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: time.sleep(0.5))
    monkeypatch.setattr(os, "environ", {})
    hosts.start()
    assert "waiting for the other processes" in capsys.readouterr().err


def test_the_code_is_reported_by_its_content(tmp_path):
    script = tmp_path / "train.py"
    script.write_text("print(1)")
    first = hosts.this_code(script)
    assert first == hosts.this_code(script) and "jax's version" in first
    script.write_text("print(2)")
    assert hosts.this_code(script)["code"] != first["code"]


@pytest.mark.parametrize("result", ["data", None])
def test_a_process_alone_acts_once(result):
    calls = []
    assert hosts.together(lambda: calls.append(1) or result) == result
    assert calls == [1]


def test_all_processes_end_where_one_cannot_go_on(monkeypatch, capsys):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(hosts, "all_true", lambda value: False)
    with pytest.raises(LlavaError, match="another process of this run cannot go on"):
        hosts.together(lambda: 1)

    def fail():
        raise LlavaError("record 3 is bad")

    with pytest.raises(LlavaError, match="^record 3 is bad$"):
        hosts.together(fail)
    assert "record 3 is bad; the other processes are waited for" in capsys.readouterr().err
