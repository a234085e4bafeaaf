"""Copies of a model that share a stream of requests: each an engine on its own devices."""

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax

from llava_jax.inference.answer import Answer
from llava_jax.inference.counts import Counts
from llava_jax.inference.engine import Engine, Grown, Waiting
from llava_jax.inference.jobs import Job, Listed, Signal, Source

POLL = 0.0005  # seconds between two looks at whether a device is done


class Replicas:
    """The interface of `Engine` over several engines: each reads, answers and caches on its own.

    One thread serves them all: while the devices of one compute, the host prepares the next call
    of another. Answers do not depend on the engine that gives them.
    """

    def __init__(self, engines: Sequence[Engine]):
        self.engines = engines
        self.dtype = engines[0].dtype

    @property
    def params(self) -> dict:
        """Those of the first copy."""
        return self.engines[0].params

    @property
    def rows(self) -> int:
        """Rows of all batches; 0 before the first request."""
        return sum(engine.rows for engine in self.engines)

    @property
    def cache_use(self) -> float:
        """As of an engine, the mean of all."""
        return sum(engine.cache_use for engine in self.engines) / len(self.engines)

    @property
    def counts(self) -> Counts:
        each = [dataclasses.astuple(engine.counts) for engine in self.engines]
        return Counts(*map(sum, zip(*each, strict=True)))

    def forget(self) -> None:
        for engine in self.engines:
            engine.forget()

    def logits(self, *inputs) -> jax.Array:
        return self.engines[0].logits(*inputs)

    def warm_up(
        self,
        batch_size: int,
        size: int,
        report: Callable[[int, int], None] = lambda *_: None,
        few: bool = False,
        contrast: bool = False,
        traces: bool = False,
    ) -> None:
        count = len(self.engines)
        for i, engine in enumerate(self.engines):
            of_all = lambda done, calls, i=i: report(i * calls + done, count * calls)
            engine.warm_up(self._share(batch_size), size, of_all, few, contrast, traces)

    def _share(self, batch_size: int) -> int:
        return -(-batch_size // len(self.engines))

    def run(self, jobs: Source | Iterable[Job], batch_size: int) -> Iterator[Answer]:
        """Like `Engine.run`; `batch_size` is that of all together."""
        share = self._share(batch_size)
        source = jobs if hasattr(jobs, "poll") else Listed(jobs)
        router = Router(source, len(self.engines), share)
        # Each engine's work, and what it waits for.
        waits: dict[Iterator, Waiting | None] = {
            engine.steps(router.source(i), share): None for i, engine in enumerate(self.engines)
        }
        try:
            while waits:
                ready = [work for work, wait in waits.items() if wait is None or wait.ready()]
                if not ready:
                    idle = [wait.idle for wait in waits.values()]
                    if not all(idle):
                        time.sleep(POLL)
                    elif not router.kept:
                        source.wait(min(idle))
                    ready = [work for work, wait in waits.items() if wait.idle]
                for work in ready:
                    event = next(work, None)
                    if event is None:
                        del waits[work]
                    elif isinstance(event, Grown):
                        waits[work] = None
                        yield event.answer
                    else:
                        waits[work] = event
        finally:
            for work in waits:
                work.close()


class Router:
    """Gives each of `count` engines its part of a stream of jobs, when it asks for one.

    Jobs about the same pictures that follow each other go to one engine, which then reads the
    pictures once; unless `most` wait for it already.
    """

    def __init__(self, source: Source, count: int, most: int):
        self._source = source
        self._kept = [deque() for _ in range(count)]
        self._most = most
        self._pictures, self._engine = (), 0  # of the latest job

    @property
    def kept(self) -> int:
        """Jobs that were taken for an engine that has not asked for them yet."""
        return sum(map(len, self._kept))

    def source(self, engine: int) -> "RoutedJobs":
        """The part of one engine."""
        return RoutedJobs(self, engine, self._source)

    def poll(self, engine: int) -> Job | Signal:
        kept = self._kept[engine]
        while not kept:
            job = self._source.poll()
            if isinstance(job, Signal):
                return job
            pictures = tuple(picture.key for picture in job.request.pictures)
            follows = bool(pictures) and pictures == self._pictures
            if not follows or len(self._kept[self._engine]) >= self._most:
                self._engine = engine
            self._pictures = pictures
            self._kept[self._engine].append(job)
        return kept.popleft()


@dataclasses.dataclass(frozen=True)
class RoutedJobs:
    """The jobs of one engine, as a source."""

    router: Router
    engine: int
    whole: Source

    @property
    def live(self) -> bool:
        return self.whole.live

    def poll(self) -> Job | Signal:
        return self.router.poll(self.engine)

    def wait(self, seconds: float) -> None:
        self.whole.wait(seconds)
