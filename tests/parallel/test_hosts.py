"""How processes find each other, as their surroundings tell, and what must be the same in all."""

import os
import subprocess
import sys

import pytest

from llava_jax.parallel import hosts

SLURM = {
    "SLURM_JOB_ID": "7000123",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_NTASKS": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "1",
    "OMPI_COMM_WORLD_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}
START = """
import jax
from llava_jax.errors import LlavaError
from llava_jax.parallel import hosts
try:
    hosts.start()
    print("joined" if jax.distributed.is_initialized() else "alone", jax.process_count())
except LlavaError as error:
    print("error:", error)
"""


@pytest.mark.parametrize(
    "surroundings, told",
    [
        ({}, "alone 1"),
        (SLURM, "joined 1"),
        (OPEN_MPI, "joined 1"),
        (POD, "alone 1"),
        (POD | {"JOB_COMPLETION_INDEX": "1"}, "error: this pod is one of a Kubernetes Job, but"),
        ({"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1234"}, "error: the processes of this run cannot"),
    ],
    ids=["laptop", "Slurm", "Open MPI", "pod", "Kubernetes without its package", "half told"],
)
def test_processes_are_found_by_their_surroundings(surroundings, told):
    marks = ("SLURM", "OMPI", "KUBERNETES", "JOB_", "JAX_COORDINATOR", "JAX_NUM", "JAX_PROCESS")
    plain = {k: v for k, v in os.environ.items() if not k.startswith(marks)}
    process = subprocess.run(
        [sys.executable, "-c", START],
        env=plain | surroundings | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert process.stdout.strip().splitlines()[-1].startswith(told), process.stderr


def test_the_code_is_told_by_its_content(tmp_path):
    script = tmp_path / "train.py"
    script.write_text("print(1)")
    first = hosts.this_code(script)
    assert first == hosts.this_code(script) and "jax's version" in first
    script.write_text("print(2)")
    assert hosts.this_code(script)["code"] != first["code"]
