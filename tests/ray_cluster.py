"""A Ray cluster of several nodes, each with processes of its own, on this machine."""

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
MEMORY = 100_000_000  # bytes of each node's object store


@contextlib.contextmanager
def ray_cluster(nodes: int) -> Iterator:
    """A cluster of so many nodes of one CPU, the first its head; this process is connected to it.

    Its workers import what the tests import, and compute on CPUs.
    """
    import ray
    from ray.cluster_utils import Cluster

    quiet = {
        "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1", "RAY_SERVE_LOG_TO_STDERR": "0",
        "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0",
    }  # fmt: skip
    before = {name: os.environ.get(name) for name in quiet}
    os.environ.update(quiet)
    node = {"num_cpus": 1, "object_store_memory": MEMORY, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    try:
        for _ in range(nodes - 1):
            cluster.add_node(num_cpus=1, object_store_memory=MEMORY)
        ray.init(cluster.address, log_to_driver=False)
        cluster.wait_for_nodes()
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def kill(pid: int) -> None:
    """Ends a process that a test has found, at once."""
    os.kill(pid, signal.SIGKILL)


def node_of(cluster, pid: int):
    """The node, not the head, that a process is of; None if it is of none."""
    parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    for node in cluster.worker_nodes:
        if parent in [info.process.pid for infos in node.all_processes.values() for info in infos]:
            return node
    return None
