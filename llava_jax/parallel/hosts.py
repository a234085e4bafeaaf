"""Several hosts: how their processes find each other, and that they run the same thing."""

import hashlib
import json
import os
import shlex
import sys
import threading
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from llava_jax.errors import LlavaError
from llava_jax.parallel.shares import Meeting, Shard, differences

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers")
_PATIENCE = 30.0  # seconds
_WAITING = "waiting for the other processes of this run: all must start, and reach the first"
_NO_CLUSTER = "coordinator_address should be defined"
_NO_OTHERS = (
    "this pod is one of a Kubernetes Job, but cannot find the others: pip install 'jax[k8s]'"
)
_PLACE = ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
# A slice of several hosts has 2 x 2 chips on each. With these the TPU library uses those alone.
_CHIPS_OF_THIS_HOST = {
    "TPU_PROCESS_BOUNDS": "1,1,1",
    "TPU_CHIPS_PER_PROCESS_BOUNDS": "2,2,1",
    "TPU_HOST_BOUNDS": "1,1,1",  # the earlier name, which GKE sets
    "TPU_CHIPS_PER_HOST_BOUNDS": "2,2,1",
    "TPU_WORKER_ID": "0",
    "CLOUD_TPU_TASK_ID": "0",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def start() -> None:
    """Joins the processes of a run over several hosts; does nothing if there is only one.

    JAX finds the others on Cloud TPU, Slurm, Kubernetes (JobSet, indexed Job) and Open MPI.
    Elsewhere each process needs JAX_COORDINATOR_ADDRESS (host:port of the first),
    JAX_NUM_PROCESSES and JAX_PROCESS_ID. Must run before anything else asks JAX for a device. A
    process that waits for others says so; JAX itself ends it after five minutes.

    Raises:
      LlavaError: the environment names other processes, but not all that is needed to join them.
    """
    in_job = "JOB_COMPLETION_INDEX" in os.environ
    if _pod_by_itself():
        return
    if ":" not in os.environ.get("JAX_COORDINATOR_ADDRESS", ":"):
        raise LlavaError(
            f"JAX_COORDINATOR_ADDRESS is {os.environ['JAX_COORDINATOR_ADDRESS']!r}: it needs a "
            "port, as 10.0.0.1:1234"
        )
    waiting = threading.Timer(_PATIENCE, print, [_WAITING], {"file": sys.stderr, "flush": True})
    waiting.daemon = True
    waiting.start()
    try:
        count, index = map(_number, _PLACE)
        jax.distributed.initialize(num_processes=count, process_id=index)
    except ValueError as error:
        if _NO_CLUSTER not in str(error):
            raise LlavaError(f"the processes of this run cannot join: {error}") from None
        if in_job:
            raise LlavaError(_NO_OTHERS) from None
    finally:
        waiting.cancel()
    if alone_on_its_host(os.environ) and "JAX_LOCAL_DEVICE_IDS" not in os.environ:
        # JAX assumes one GPU for each process that Slurm or Open MPI started.
        jax.config.update("jax_cuda_visible_devices", "all")


def place() -> Shard | None:
    """This process among those that were started together, which it does not join.

    They are found as by `start`, but each is by itself for JAX and sees the devices of its host
    alone: JAX ends all processes that are joined when one of them dies. Must run before anything
    asks JAX for a device.

    Returns:
      Its number from 1 and theirs, as a share; None if there is only one.

    Raises:
      LlavaError: the environment names other processes, but not which of them this is.
    """
    if _pod_by_itself():
        return None
    from jax._src.clusters import ClusterEnv  # jax.distributed has no way to ask without joining

    address, ids = "not used", os.environ.get("JAX_LOCAL_DEVICE_IDS")
    try:
        _, count, index, local = ClusterEnv.auto_detect_unset_distributed_params(
            address, *map(_number, _PLACE), ids, None, None
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise LlavaError(f"the other processes of this run cannot be found: {error}") from None
    if count is None and index is None:
        if "JOB_COMPLETION_INDEX" in os.environ:
            raise LlavaError(_NO_OTHERS)
        return None
    if count is None or index is None or not 0 <= index < count:
        values = ", ".join(f"{name}={os.environ.get(name)}" for name in _PLACE)
        raise LlavaError(
            f"{values}: set both on every host, the number of processes and which of them this is, "
            "from 0"
        )
    if count == 1:
        return None
    if ids is None and local is not None and not alone_on_its_host(os.environ):
        ids = ",".join(map(str, local))  # one process for each GPU
    if ids is not None:
        jax.config.update("jax_cuda_visible_devices", ids)
        jax.config.update("jax_rocm_visible_devices", ids)
    if "TPU_PROCESS_BOUNDS" not in os.environ:
        os.environ.update(_CHIPS_OF_THIS_HOST)
        for name in [name for name in os.environ if name.startswith("MEGASCALE_")]:
            del os.environ[name]
    return Shard(index + 1, count)


def meeting(folder: Path, script: str, alone: bool = False) -> Meeting:
    """Where the processes that were started with this one share requests; see `Meeting`.

    Args:
      folder: among the results.
      script: that runs; it, the package and the arguments must be the same on every host.
      alone: whatever other processes there are, this one meets none.
    """
    here = None if alone else place()
    facts = this_code(script) | {"arguments": shlex.join(sys.argv[1:])} if here else {}
    return Meeting(folder, here, facts)


def _pod_by_itself() -> bool:
    """Whether this is a pod of Kubernetes outside a Job, such as a notebook."""
    return "KUBERNETES_SERVICE_HOST" in os.environ and "JOB_COMPLETION_INDEX" not in os.environ


def _number(name: str) -> int | None:
    """The whole number that an environment variable holds; None if it is not set."""
    try:
        return int(os.environ[name]) if name in os.environ else None
    except ValueError:
        raise LlavaError(f"{name} is {os.environ[name]!r}: give a whole number") from None


def alone_on_its_host(surroundings: Mapping[str, str]) -> bool:
    """Whether Slurm or Open MPI, by its environment variables, started one process a host."""
    if "OMPI_COMM_WORLD_LOCAL_SIZE" in surroundings:
        return surroundings["OMPI_COMM_WORLD_LOCAL_SIZE"] == "1"
    tasks = surroundings.get("SLURM_NTASKS")
    return tasks is not None and tasks == surroundings.get("SLURM_STEP_NUM_NODES")


def is_first() -> bool:
    """True in the one process that writes logs and reports what happens."""
    return jax.process_index() == 0


def report(text: str) -> None:
    """Prints a line on standard error, from process 0 alone."""
    if is_first():
        tqdm.write(text, file=sys.stderr)


def wait(name: str) -> None:
    """Waits until all processes have reached this call."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def all_true(value: bool) -> bool:
    """Whether a value is true on every process; all must call it."""
    if jax.process_count() == 1:
        return value
    return bool(np.all(multihost_utils.process_allgather(np.array(value))))


def total(value: int) -> int:
    """The sum of a number over all processes; all must call it."""
    if jax.process_count() == 1:
        return value
    return int(np.sum(multihost_utils.process_allgather(np.array(value))))


def first_alone(action: Callable[[], object]):
    """Runs `action` on process 0, which gets its result; the others wait and get None.

    Raises:
      LlavaError: `action` raised one; the other processes then end as well.
    """
    result = error = None
    if is_first():
        try:
            result = action()
        except LlavaError as raised:
            error = raised
    if not all_true(error is None):
        raise error or LlavaError("process 0 cannot go on: its message says why")
    return result


def together(action: Callable[[], object]):
    """Runs `action` on all processes at once; each gets the result of its own call.

    Raises:
      LlavaError: `action` raised one on this process, or on another; all end then.
    """
    result = error = None
    try:
        result = action()
    except LlavaError as raised:
        error = raised
        if jax.process_count() > 1:
            print(f"{error}; the other processes are waited for", file=sys.stderr, flush=True)
    if not all_true(error is None):
        raise error or LlavaError("another process of this run cannot go on: it says why")
    return result


def this_code(script: str) -> dict[str, str]:
    """SHA-256 of this package's source and of the script, and versions of the packages below."""
    root, digest = Path(__file__).parent.parent, hashlib.sha256()
    for path in (Path(script), *sorted(root.rglob("*.py"))):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return {"code": digest.hexdigest()} | {f"{p}'s version": version(p) for p in _PACKAGES}


def check_same(facts: dict[str, object]) -> None:
    """Compares `facts` between all processes.

    Args:
      facts: name -> JSON value, for everything that must be the same everywhere.

    Raises:
      LlavaError: on every process, if one differs from process 0; it names both values.
    """
    if jax.process_count() == 1:
        return
    text = np.frombuffer(json.dumps(facts, sort_keys=True).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(len(text)))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(text)] = text
    every = multihost_utils.process_allgather(padded)
    texts = (row[:size].tobytes() for row, size in zip(every, sizes, strict=True))
    first, *others = map(json.loads, texts)
    for process, other in enumerate(others, start=1):
        if difference := differences(other, first):
            raise LlavaError(
                f"process {process} differs from process 0 in {difference}: start the same code "
                "with the same command on every host"
            )
