"""Batches for the loop, how long the devices wait for them, and what to do if that is long."""

import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import jax

from llava_jax.data.pipeline import Batch

TOO_LONG = 0.1  # share of the time
_LEAST_STEPS = 10  # over which it is taken, so that one late batch counts for little


class Feed:
    """Hands out batches and measures the time in which the devices had nothing to compute.

        devices   [==== step 7 ====]          [==== step 8 ====]
        host         next() ----------------->|
                                    <-waited->

    That the host waits costs nothing while a step computes; only the rest is counted.
    """

    def __init__(self, batches: Iterator[Batch]):
        self._batches = batches
        self._thread = ThreadPoolExecutor(1, "feed")
        self._ended: Future[float] | None = None  # when the newest step did

    def next(self) -> tuple[Batch, float]:
        """The next batch, and the seconds that the devices waited for it."""
        asked = time.perf_counter()
        batch = next(self._batches)
        arrived = time.perf_counter()
        idle_since = asked
        if self._ended is not None:
            idle_since = max(asked, self._ended.result()) if self._ended.done() else arrived
        return batch, arrived - idle_since

    def computing(self, metrics: dict[str, jax.Array]) -> None:
        """Takes the metrics of the step that the devices have just been given."""
        self._ended = self._thread.submit(_time_when_ready, metrics)

    def close(self) -> None:
        """Waits for the newest step."""
        self._thread.shutdown()


def _time_when_ready(metrics: dict[str, jax.Array]) -> float:
    jax.block_until_ready(metrics)
    return time.perf_counter()


class Shortage:
    """Says once, of a run whose devices wait for data, what to turn."""

    def __init__(self, workers: int, cpus: int | None = None):
        self._workers, self._cpus = workers, cpus or len(os.sched_getaffinity(0))
        self._steps, self._seconds, self._waited, self._said = 0, 0.0, 0.0, False

    def add(self, seconds: float, waited: float) -> None:
        """Counts a step."""
        self._steps += 1
        self._seconds += seconds
        self._waited += waited

    def sentence(self) -> str:
        """What to say of the steps since it was last asked and had enough of them; often ""."""
        if self._steps < _LEAST_STEPS:
            return ""
        steps, share = self._steps, self._waited / self._seconds
        self._steps, self._seconds, self._waited = 0, 0.0, 0.0
        if self._said or share <= TOO_LONG:
            return ""
        self._said = True
        return f"the devices waited for data {share:.0%} of the last {steps} steps: {self._advice}"

    @property
    def _advice(self) -> str:
        again = "and start again: the run goes on from its last checkpoint"
        if not self._workers:
            return (
                "threads of one process read them; take processes, with "
                f"--config.data.workers={self._cpus}, {again}"
            )
        if self._workers < self._cpus:
            return f"raise --config.data.workers from {self._workers} to {self._cpus}, {again}"
        return (
            f"{self._workers} workers keep {self._cpus} CPUs busy; store the pictures at about the "
            "size that the model takes, make one data set of it all with `llava-jax build`, or "
            "take a machine with more CPUs"
        )
