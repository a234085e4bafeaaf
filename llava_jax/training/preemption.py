"""SIGTERM, which Slurm, Kubernetes and Cloud TPU send before they take a machine back."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils


@contextlib.contextmanager
def sigterm_noted() -> Iterator[Callable[[int], bool]]:
    """Notes SIGTERM within the block.

    Yields:
      stop(step), to be called once after every step: True when the run is to save and end. On
      several hosts a signal to any of them makes it true on all, at the same step.
    """
    if jax.distributed.is_initialized():  # JAX's coordination service then listens for the signal
        yield multihost_utils.reached_preemption_sync_point
        return
    asked = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield lambda step: asked.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)
