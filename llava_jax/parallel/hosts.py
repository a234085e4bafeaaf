"""Several hosts: how their processes find each other, and that they run the same thing."""

import hashlib
import json
import os
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

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers")
_PATIENCE = 30.0  # seconds
_WAITING = "waiting for the other processes of this run: all must start, and reach the first"
_NO_CLUSTER = "coordinator_address should be defined"


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
    if "KUBERNETES_SERVICE_HOST" in os.environ and not in_job:
        return  # a pod by itself, such as a notebook
    number = lambda name: int(os.environ[name]) if name in os.environ else None
    if ":" not in os.environ.get("JAX_COORDINATOR_ADDRESS", ":"):
        raise LlavaError(
            f"JAX_COORDINATOR_ADDRESS is {os.environ['JAX_COORDINATOR_ADDRESS']!r}: it needs a "
            "port, as 10.0.0.1:1234"
        )
    waiting = threading.Timer(_PATIENCE, print, [_WAITING], {"file": sys.stderr, "flush": True})
    waiting.daemon = True
    waiting.start()
    try:
        jax.distributed.initialize(
            num_processes=number("JAX_NUM_PROCESSES"), process_id=number("JAX_PROCESS_ID")
        )
    except ValueError as error:
        if _NO_CLUSTER not in str(error):
            raise LlavaError(f"the processes of this run cannot join: {error}") from None
        if in_job:
            raise LlavaError(
                "this pod is one of a Kubernetes Job, but cannot find the others: "
                "pip install 'jax[k8s]'"
            ) from None
    finally:
        waiting.cancel()
    if alone_on_its_host(os.environ) and "JAX_LOCAL_DEVICE_IDS" not in os.environ:
        # JAX assumes one GPU for each process that Slurm or Open MPI started.
        jax.config.update("jax_cuda_visible_devices", "all")


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
        keys = sorted(k for k in other.keys() | first.keys() if other.get(k) != first.get(k))
        if keys:
            raise LlavaError(
                f"process {process} differs from process 0 in "
                + "; ".join(f"{k}: {other.get(k)!r} and not {first.get(k)!r}" for k in keys[:5])
                + ": start the same code with the same command on every host"
            )
