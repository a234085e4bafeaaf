"""The engine on a thread of its own, fed with requests while it runs."""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from llava_jax.inference.answer import Answer, TokenLogprob
from llava_jax.inference.counts import Counts
from llava_jax.inference.engine import Engine
from llava_jax.inference.jobs import Job, LiveJobs
from llava_jax.inference.replicas import Replicas
from llava_jax.serving.api import ApiError
from llava_jax.serving.metrics import Metrics

FAULTS_IN_A_ROW = (
    3  # failed runs without a whole answer between them, after which the engine is given up
)
LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Piece:
    """News of one answer.

    Attributes:
      index: which of the request's answers.
      text: what can be shown since the last piece.
      logprobs: of the tokens since the last piece.
      reason: how the answer ended, in its last piece; None before.
      error: why there is no answer.
    """

    index: int
    text: str = ""
    logprobs: Sequence[TokenLogprob] = ()
    reason: str | None = None
    error: ApiError | None = None


@dataclass(eq=False)
class Ticket:
    """A request on its way: its jobs, one for each answer, and where their pieces go.

    Args:
      deliver: called on the event loop with each piece.
    """

    jobs: list[Job]
    deliver: Callable[[Piece], None]
    shown: list[int] = field(default_factory=list)  # log probabilities delivered, by answer

    def __post_init__(self):
        self.shown = [0] * len(self.jobs)

    def piece(self, index: int) -> Piece:
        """What is new of an answer; called on the engine's thread."""
        answer = self.jobs[index].answer
        logprobs = answer.logprobs[self.shown[index] :]
        self.shown[index] = len(answer.logprobs)
        reason = answer.finish_reason if answer.done else None
        if answer.error:  # its words may name what is no client's business
            LOG.info("a picture could not be read: %s", answer.error)
            error = ApiError(400, "a picture cannot be read", "messages", "invalid_image")
            return Piece(index, error=error)
        return Piece(index, answer.take(final=answer.done), logprobs, reason)


def engine_failed() -> ApiError:
    """The error of requests whose computation was lost."""
    return ApiError(500, "the engine failed: ask again", code="engine_failed")


class Mailbox:
    """Pieces for the event loop, which is woken once for all that one step gives."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop, self._lock = loop, threading.Lock()
        self._pieces: list[tuple[Ticket, Piece]] = []

    def put(self, ticket: Ticket, piece: Piece) -> None:
        """May be called on any thread; the piece is delivered on the event loop."""
        with self._lock:
            wake = not self._pieces
            self._pieces.append((ticket, piece))
        if wake:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody reads
                self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        with self._lock:
            pieces, self._pieces = self._pieces, []
        for ticket, piece in pieces:
            ticket.deliver(piece)


class Worker(threading.Thread):
    """Runs an engine: every call of JAX and every decoding of tokens happens on this thread.

    Args:
      engine: warmed up for `batch_size` rows.
      loop: the event loop that pieces are delivered on.

    Attributes:
      dead: the engine was given up, and nothing will be answered.
    """

    def __init__(
        self,
        engine: Engine | Replicas,
        batch_size: int,
        loop: asyncio.AbstractEventLoop,
        metrics: Metrics,
    ):
        super().__init__(name="engine", daemon=True)
        self.engine, self.batch_size, self.dead = engine, batch_size, False
        self._metrics, self._mail = metrics, Mailbox(loop)
        self._source = LiveJobs()
        # id of an answer -> its ticket and index. Both threads add and remove, under the lock.
        self._live: dict[int, tuple[Ticket, int]] = {}
        self._lock = threading.Lock()
        self._last_sign, self._faults = time.monotonic(), 0
        self._counted = Counts()

    # On the event loop.

    def submit(self, ticket: Ticket) -> None:
        """Queues all answers of a request; ApiError if the engine was given up."""
        with self._lock:
            if self.dead:
                raise engine_failed()
            if not self._live:  # an idle engine gives no sign of life
                self._last_sign = time.monotonic()
            for index, job in enumerate(ticket.jobs):
                self._live[id(job.answer)] = ticket, index
        self._source.put(*ticket.jobs)

    def cancel(self, ticket: Ticket) -> None:
        """Gives up what has not ended of a request; its rows are free within two calls."""
        for job in ticket.jobs:
            if self._remove(job.answer):
                job.answer.cancel()
                self._metrics.cancelled.inc()

    def fail_all(self, error: Callable[[], ApiError], dead: bool = False) -> None:
        """Answers everything that was submitted with an error; may be called on any thread.

        Args:
          error: makes one for each request, since a raised exception keeps its frames.
          dead: nothing will be answered from now on either.
        """
        with self._lock:
            self.dead |= dead
            entries = list(self._live.values())
            self._live.clear()
        for ticket, index in entries:
            ticket.jobs[index].answer.cancel()
            self._mail.put(ticket, Piece(index, error=error()))

    @property
    def live(self) -> int:
        """Answers that were submitted and have not ended."""
        return len(self._live)

    def close(self) -> None:
        """Ends the thread once all submitted requests are answered or cancelled."""
        self._source.close()

    def stuck(self, seconds: float) -> bool:
        """Whether there is work and the engine gave no sign of life for so long."""
        return bool(self._live) and time.monotonic() - self._last_sign > seconds

    @property
    def failed(self) -> bool:
        """Whether only a new process can help."""
        return self.dead or self.stuck(300)

    def measure(self) -> None:
        """Brings the metrics up to date."""
        with self._lock:
            live = [ticket.jobs[index] for ticket, index in self._live.values()]
        running = [job for job in live if job.pages]
        self._metrics.running.set(len(running))
        self._metrics.waiting.set(len(live) - len(running))
        self._metrics.cache_use.set(self.engine.cache_use)
        counts = self.engine.counts
        self._metrics.compilations.set(counts.compilations)
        counters = {
            "prompt_tokens": self._metrics.prompt_tokens,
            "answer_tokens": self._metrics.generation_tokens,
            "shared_tokens": self._metrics.cached_tokens,
            "put_back": self._metrics.put_back,
            "drafts": self._metrics.drafts,
            "draft_tokens": self._metrics.draft_tokens,
            "accepted_tokens": self._metrics.accepted_tokens,
        }
        for name, counter in counters.items():
            counter.inc(getattr(counts, name) - getattr(self._counted, name))
        self._counted = counts

    # On the engine's thread.

    def run(self) -> None:
        while True:
            try:
                for answer in self.engine.run(self._source, self.batch_size):
                    self._grown(answer)
                return
            except Exception:
                LOG.exception("an engine step failed")
                self._metrics.faults.inc()
                self._faults += 1
                # The state of what was running is lost.
                self.fail_all(engine_failed, dead=self._faults >= FAULTS_IN_A_ROW)
                if self.dead:
                    return

    def _grown(self, answer: Answer) -> None:
        self._last_sign = time.monotonic()
        if answer.finish_reason in ("stop", "length"):  # a first token is no proof that others come
            self._faults = 0
        with self._lock:
            entry = self._live.get(id(answer))
        if entry is None:  # cancelled
            return
        ticket, index = entry
        if answer.done:
            self._remove(answer)
        self._mail.put(ticket, ticket.piece(index))

    def _remove(self, answer: Answer) -> bool:
        with self._lock:
            return self._live.pop(id(answer), None) is not None
