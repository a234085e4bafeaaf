"""What the engine is asked, and where it takes it from.

A `Request` says what to answer; a `Job` is one answer to it on its way through the engine; an
`Answer` (answer.py) is what grows. A source gives the engine its jobs.
"""

import enum
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from llava_jax.inference.answer import Answer
from llava_jax.inference.sampling import SamplingParams
from llava_jax.models.images import Layout


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture of a request, read when the turn of the request comes.

    Attributes:
      layout: its tiles and tokens.
      load: gives the tiles, uint8[tiles, S, S, 3]; called in a thread of the engine's pool, and
        raises LlavaError if the picture cannot be read.
      key: equal for two pictures that are the same.
    """

    layout: Layout
    load: Callable[[], np.ndarray]
    key: object = None


@dataclass(frozen=True)
class Request:
    """One prompt as the model reads it, and how to answer it.

    Attributes:
      input_ids: int32[T], with the placeholder ids of the pictures.
      pictures: in the order of their placeholders.
    """

    input_ids: np.ndarray
    pictures: tuple[Picture, ...]
    params: SamplingParams


@dataclass(eq=False)
class Job:
    """One answer to a request, from the queue to the row of the cache that it is computed in.

    Attributes:
      stops: tokens that end the answer.
      budget: the most tokens that the answer may have.
      tiles: of each picture, its tiles as (digest, uint8[S, S, 3]), while they are loaded.
      contents: int64[T], the prompt as `RowSlots` compares it.
      feature_ids: int32[T], as in `Prompts`.
      row: of the cache.
      shared: number of tokens at the start of the prompt that other rows hold.
      sources: int32[T], the row that computes, or has computed, each token.
      produced: tokens so far.
    """

    request: Request
    answer: Answer
    stops: tuple[int, ...]
    budget: int
    tiles: list[Future] = field(default_factory=list)
    contents: np.ndarray | None = None
    feature_ids: np.ndarray | None = None
    row: int = 0
    shared: int = 0
    sources: np.ndarray | None = None
    produced: list[int] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.input_ids)

    @property
    def rest(self) -> int:
        """Tokens of the prompt that no other row holds."""
        return self.length - self.shared

    @property
    def need(self) -> int:
        """Cache slots for the prompt and its answer."""
        return self.length + self.budget

    @property
    def loaded(self) -> bool:
        """Whether all tiles are there, or a picture could not be read."""
        return all(future.done() for future in self.tiles)


class Signal(enum.Enum):
    """What a source says if it gives no job."""

    NOTHING_NOW = "nothing now"
    END = "end"


NOTHING_NOW, END = Signal.NOTHING_NOW, Signal.END


class Source(Protocol):
    """Where an engine takes its jobs from.

    Attributes:
      live: jobs arrive while others are answered. A job whose pictures are still being read is
        then overtaken by those behind it; else jobs keep their order.
    """

    live: bool

    def poll(self) -> Job | Signal:
        """The next job, without waiting: NOTHING_NOW if there may be one later, END if not."""

    def wait(self, seconds: float) -> None:
        """Returns as soon as there may be something to poll, at the latest after `seconds`."""


class Listed:
    """A source of jobs that are all known, or made one after another, such as those of a file."""

    live = False

    def __init__(self, jobs: Iterable[Job]):
        self._jobs: Iterator[Job] = iter(jobs)

    def poll(self) -> Job | Signal:
        return next(self._jobs, END)

    def wait(self, seconds: float) -> None:
        """Never called: there is always a job, or the end."""


class LiveJobs:
    """A source that other threads put jobs into, such as those of a server."""

    live = True

    def __init__(self):
        self._jobs: deque[Job] = deque()
        self._closed = False
        self._changed = threading.Condition()

    def __len__(self) -> int:
        """Jobs that no engine has taken yet."""
        return len(self._jobs)

    def put(self, *jobs: Job) -> None:
        """Adds jobs, the answers of one request together."""
        with self._changed:
            self._jobs.extend(jobs)
            self._changed.notify_all()

    def close(self) -> None:
        """No job will follow: the engine ends when it has answered all."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def poll(self) -> Job | Signal:
        with self._changed:
            if self._jobs:
                return self._jobs.popleft()
            return END if self._closed else NOTHING_NOW

    def wait(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._closed, seconds)


def as_source(jobs: Source | Iterable[Job]) -> Source:
    """A source itself, or one of the jobs of an iterable."""
    return jobs if hasattr(jobs, "poll") else Listed(jobs)
