"""Copies of a model that share a stream of requests: each an engine on its own devices."""

import dataclasses
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import jax

from llava_jax.inference.answer import Answer
from llava_jax.inference.engine import Counts, Engine
from llava_jax.inference.jobs import Request
from llava_jax.inference.sampling import SamplingParams

POLL = 0.0005  # seconds between two looks at whether a device is done


class Replicas:
    """What `Engine` is, over several: each reads, answers and remembers on its own.

    One thread serves them all: while the devices of one compute, the host prepares the next call of
    another. Answers do not depend on the engine that gives them.
    """

    def __init__(self, engines: Sequence[Engine]):
        self.engines = engines
        self.dtype = engines[0].dtype
        self.stop_ids = engines[0].stop_ids

    @property
    def params(self) -> dict:
        """Those of the first copy."""
        return self.engines[0].params

    @property
    def rows(self) -> int:
        """Rows of all batches; 0 before the first request."""
        return sum(engine.rows for engine in self.engines)

    @property
    def counts(self) -> Counts:
        each = [dataclasses.astuple(engine.counts) for engine in self.engines]
        return Counts(*map(sum, zip(*each, strict=True)))

    def forget(self) -> None:
        for engine in self.engines:
            engine.forget()

    def stops(self, params: SamplingParams) -> tuple[int, ...]:
        return self.engines[0].stops(params)

    def check(self, request: Request) -> None:
        self.engines[0].check(request)

    def logits(self, *inputs) -> jax.Array:
        return self.engines[0].logits(*inputs)

    def warm_up(self, batch_size: int, size: int) -> None:
        for engine in self.engines:
            engine.warm_up(self._share(batch_size), size)

    def _share(self, batch_size: int) -> int:
        return -(-batch_size // len(self.engines))

    def run(self, requests: Iterable[tuple[Request, Answer]], batch_size: int) -> Iterator[Answer]:
        """As `Engine.run`; `batch_size` is that of all together."""
        share = self._share(batch_size)
        router = Router(requests, len(self.engines), share)
        # Each engine's work, and the array that it waits for.
        waits: dict[Iterator, jax.Array | None] = {
            engine.steps(router.feed(i), share): None for i, engine in enumerate(self.engines)
        }
        try:
            while waits:
                ready = [work for work, array in waits.items() if array is None or array.is_ready()]
                if not ready:
                    time.sleep(POLL)
                for work in ready:
                    told = next(work, None)
                    if told is None:
                        del waits[work]
                    elif isinstance(told, Answer):
                        waits[work] = None
                        yield told
                    else:
                        waits[work] = told
        finally:
            for work in waits:
                work.close()


class Router:
    """Gives each of `count` engines its part of a stream of requests, when it asks for one.

    Those about the same pictures that follow each other go to one engine, which then reads the
    pictures once; unless `most` wait for it already.
    """

    def __init__(self, requests: Iterable[tuple[Request, Answer]], count: int, most: int):
        self._requests = iter(requests)
        self._kept = [deque() for _ in range(count)]
        self._most = most
        self._pictures, self._engine = (), 0  # of the latest request

    def feed(self, engine: int) -> Iterator[tuple[Request, Answer]]:
        kept = self._kept[engine]
        while True:
            while kept:
                yield kept.popleft()
            entry = next(self._requests, None)
            if entry is None:
                return
            pictures = entry[0].pictures
            follows = bool(pictures) and pictures == self._pictures
            if not follows or len(self._kept[self._engine]) >= self._most:
                self._engine = engine
            self._pictures = pictures
            self._kept[self._engine].append(entry)
