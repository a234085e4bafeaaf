"""What the engine is asked, and where it takes it from.

A `Request` says what to answer; a `Job` is one answer to it on its way through the engine; an
`Answer` (answer.py) is what grows. A source gives the engine its jobs.
"""

import enum
import hashlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image

from llava_jax.errors import LlavaError
from llava_jax.inference.answer import Answer
from llava_jax.inference.sampling import SamplingParams
from llava_jax.models.cache import PAGE
from llava_jax.models.images import Layout
from llava_jax.models.llava import LlavaConfig


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture or video of a request, read when the turn of the request comes.

    Attributes:
      layout: its tiles and tokens.
      load: gives the tiles, uint8[tiles, S, S, 3]; called in a thread of the engine's pool, and
        raises LlavaError if the picture cannot be read.
      key: equal for two pictures that are the same.
      is_video: it is a video.
      time: the sentences about its times that the question follows, if the model reads any.
      original: gives the upright picture in RGB that the tiles are cut from; None of a video.
    """

    layout: Layout
    load: Callable[[], np.ndarray]
    key: object = None
    is_video: bool = False
    time: str = ""
    original: Callable[[], Image.Image] | None = None


@dataclass(frozen=True)
class Request:
    """One prompt as the model reads it, and how to answer it.

    Attributes:
      input_ids: int32[T], with the placeholder ids of the pictures.
      pictures: in the order of their placeholders.
      traced: so many of the last tokens are the answer: it is traced, and nothing is generated.
    """

    input_ids: np.ndarray
    pictures: tuple[Picture, ...]
    params: SamplingParams
    traced: int = 0


def picture_places(request: Request, config: LlavaConfig) -> list[np.ndarray]:
    """int[n] for each picture of a request: where its tokens are among the prompt's."""
    ids = [i for i in (config.image_token_id, config.video_token_id) if i is not None]
    places = np.flatnonzero(np.isin(request.input_ids, ids))
    lengths = [len(picture.layout) for picture in request.pictures]
    return np.split(places, np.cumsum(lengths))[:-1]


@dataclass(eq=False)
class Job:
    """One answer to a request, from the queue to the row that it is computed in.

    If the cache is full a job may have to give way: it waits again, and what it has produced is
    then read behind its prompt.

    Attributes:
      stops: tokens that end the answer.
      budget: the most tokens that the answer may have.
      tiles: of each picture, while they are loaded.
      contents: int64[T], the prompt and what is produced so far, as `Pages` compares it.
      feature_ids, feature_weights: of those T tokens, as in `Prompts`.
      row: of the state.
      pages: of the cache, which hold the tokens in their order and have room for the next.
      shared: tokens at the start that pages held when the job got its row.
      read: tokens that need not be read any more, the shared ones at first.
      produced: tokens so far.
      twin: with contrast, the job of the prompt with worse pictures. It is read and decoded in a
        row of its own at the same time, and has the answer's tokens; see distortion.py.
    """

    request: Request
    answer: Answer
    stops: tuple[int, ...]
    budget: int
    tiles: list[Future] = field(default_factory=list)
    contents: np.ndarray | None = None
    feature_ids: np.ndarray | None = None
    feature_weights: np.ndarray | None = None
    row: int = 0
    pages: list[int] = field(default_factory=list)
    shared: int = 0
    read: int = 0
    produced: list[int] = field(default_factory=list)
    twin: "Job | None" = None

    @property
    def readings(self) -> tuple["Job", ...]:
        """The job and its twin, if it has one: each takes a row of the cache."""
        return (self,) if self.twin is None else (self, self.twin)

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.input_ids)

    @property
    def filled(self) -> int:
        """Tokens of the prompt and of the answer so far."""
        return self.length + len(self.produced)

    @property
    def most(self) -> int:
        """Tokens of the prompt and of the longest answer."""
        return self.length + self.budget

    @property
    def pages_at_most(self) -> int:
        """Pages of the cache for the job and its twin, with the longest answer."""
        return sum(pages_of(reading.most) for reading in self.readings)

    @property
    def ids(self) -> np.ndarray:
        """int32[filled], the prompt and the answer so far."""
        return np.concatenate([self.request.input_ids, np.array(self.produced, np.int32)])

    @property
    def rest(self) -> int:
        """Tokens that are still to be read."""
        return self.filled - self.read

    @property
    def loading(self) -> list[Future]:
        """The tiles of each picture, the twin's too."""
        return [future for reading in self.readings for future in reading.tiles]

    @property
    def loaded(self) -> bool:
        """Whether all tiles are there, or a picture could not be read."""
        return all(future.done() for future in self.loading)


def pages_of(tokens: int) -> int:
    """Pages of the cache that hold so many tokens."""
    return -(-tokens // PAGE)


def limited(job: Job, tokens: int | None) -> Job:
    """The job, with an answer no longer than a cache of so many tokens has room for.

    Raises:
      LlavaError: the prompt alone, with its twin's, leaves no room.
    """
    if tokens is None:
        return job
    each = tokens // PAGE // len(job.readings) * PAGE
    longest = max(reading.length for reading in job.readings)
    if longest >= each:
        twice = "; with contrast it is read twice" if job.twin else ""
        raise LlavaError(
            f"the prompt has {longest:,} tokens and leaves no room for an answer: the cache holds "
            f"cache_tokens={tokens:,}{twice}; shorten the prompt or raise cache_tokens"
        )
    for reading in job.readings:
        reading.budget = min(job.budget, each - longest)
    return job


def rows_of(jobs: Iterable[Job]) -> list[int]:
    """The rows that jobs were given."""
    return [reading.row for job in jobs for reading in job.readings]


def that_fit(jobs: Iterable[Job], rows: int) -> list[Job]:
    """The first of the jobs, as many as so many rows hold."""
    fitting = []
    for job in jobs:
        rows -= len(job.readings)
        if rows < 0:
            break
        fitting.append(job)
    return fitting


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


class Tiles(NamedTuple):
    """A picture that was read.

    Attributes:
      digest: equal for two pictures if all their tokens show the same.
      tiles: each as (digest, uint8[S, S, 3]).
    """

    digest: bytes
    tiles: list[tuple[bytes, np.ndarray]]


class Queue:
    """Jobs that wait for a row, whose pictures are read meanwhile by the threads of a pool.

    Attributes:
      source: of the jobs.
      jobs: those that wait, in their order.
      ended: no job will follow those that wait.
    """

    def __init__(self, jobs: Source | Iterable[Job], pool: Executor):
        self.ended = False
        self.source, self._pool = jobs if hasattr(jobs, "poll") else Listed(jobs), pool
        self.jobs: list[Job] = []

    def fill(self, count: int) -> int:
        """Takes jobs until `count` wait or the source is silent -> how many were taken."""
        taken = 0
        while not self.ended and len(self.jobs) < count:
            job = self.source.poll()
            if job is NOTHING_NOW:
                break
            if job is END:
                self.ended = True
                break
            job.answer.prompt_tokens = job.length
            for reading in job.readings:
                pictures = reading.request.pictures
                reading.tiles = [self._pool.submit(read_tiles, picture) for picture in pictures]
            self.jobs.append(job)
            taken += 1
        return taken

    def remove_ended(self) -> list[Answer]:
        """Removes jobs that were cancelled or have an unreadable picture -> their answers."""
        ended = []
        for job in self.jobs:
            if job.answer.cancelled:
                job.answer.end()
            elif job.loaded and (error := _error_of(job)):
                job.answer.fail(error)
            if job.answer.done:
                ended.append(job)
        self.remove(ended)
        return [job.answer for job in ended]

    def close(self) -> None:
        """Pictures of jobs that will not be answered need not be read."""
        for job in self.jobs:
            for future in job.loading:
                future.cancel()

    def ready(self, rows: int) -> list[Job]:
        """The next jobs whose pictures are there, as many as so many rows hold.

        A live source's are those that are loaded by now. Other jobs keep their order: the first
        ones are waited for, so that what runs together does not depend on the speed of a disk.
        """
        if self.source.live:
            return that_fit((job for job in self.jobs if job.loaded), rows)
        jobs = that_fit(self.jobs, rows)
        for job in jobs:
            for future in job.loading:
                future.exception()
        return jobs

    def remove(self, jobs: Sequence[Job]) -> None:
        """Takes jobs out; the pictures of those that are not answered need not be read."""
        gone = set(jobs)
        self.jobs = [job for job in self.jobs if job not in gone]

    def put_back(self, jobs: Sequence[Job]) -> None:
        """Jobs that were ready, but are read later, or again."""
        self.jobs[:0] = jobs


def read_tiles(picture: Picture) -> Tiles:
    """The tiles of a picture; runs in a thread of the pool."""
    tiles, layout = picture.load(), picture.layout
    head = f"{tiles.shape[1:]}{tiles.dtype}".encode()
    digests = [hashlib.sha256(head + tile.tobytes()).digest() for tile in tiles]
    whole = hashlib.sha256(f"{len(digests)} {len(layout)} ".encode() + b"".join(digests))
    whole.update(layout.features.tobytes())
    if layout.weights is not None:
        whole.update(layout.weights.tobytes())
    return Tiles(whole.digest(), list(zip(digests, tiles, strict=True)))


def _error_of(job: Job) -> LlavaError | None:
    """Why a picture of a job cannot be read; other exceptions are bugs and are raised."""
    for future in job.loading:
        error = future.exception()
        if isinstance(error, LlavaError):
            return error
        if error:
            raise error
    return None
