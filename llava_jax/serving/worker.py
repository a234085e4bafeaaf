"""The engine on a thread of its own, fed with requests while it runs."""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from llava_jax.inference.answer import Answer, TokenLogprob
from llava_jax.inference.engine import Engine
from llava_jax.inference.jobs import Job, LiveJobs
from llava_jax.inference.replicas import Replicas
from llava_jax.serving.api import ApiError
from llava_jax.serving.metrics import Metrics

FAULTS_IN_A_ROW = 3  # failed runs without a token between them, after which the engine is given up
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
        if answer.error:
            error = ApiError(400, str(answer.error), "messages", "invalid_image")
            return Piece(index, error=error)
        return Piece(index, answer.take(final=answer.done), logprobs, reason)


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
        self._loop, self._metrics = loop, metrics
        self._source = LiveJobs()
        self._live: dict[int, tuple[Ticket, int]] = {}  # id of an answer -> its ticket and index
        self._news: deque[tuple[Ticket, Piece]] = deque()
        self._last_sign, self._faults = time.monotonic(), 0
        self._counted = {"prompt_tokens": 0, "answer_tokens": 0, "shared_tokens": 0}

    # On the event loop.

    def submit(self, ticket: Ticket) -> None:
        """Queues all answers of a request."""
        for index, job in enumerate(ticket.jobs):
            self._live[id(job.answer)] = ticket, index
        self._source.put(*ticket.jobs)

    def cancel(self, ticket: Ticket) -> None:
        """Gives up what has not ended of a request; its rows are free within two calls."""
        for job in ticket.jobs:
            if self._live.pop(id(job.answer), None):
                job.answer.cancel()
                self._metrics.cancelled.inc()

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

    def measure(self) -> None:
        """Brings the metrics up to date."""
        live = [ticket.jobs[index] for ticket, index in list(self._live.values())]
        running = sum(bool(job.produced) for job in live)
        self._metrics.running.set(running)
        self._metrics.waiting.set(len(live) - running)
        self._metrics.cache_use.set(min(1.0, running / self.batch_size))
        counts = self.engine.counts
        self._metrics.compilations.set(counts.compilations)
        counters = {
            "prompt_tokens": self._metrics.prompt_tokens,
            "answer_tokens": self._metrics.generation_tokens,
            "shared_tokens": self._metrics.cached_tokens,
        }
        for name, counter in counters.items():
            now = getattr(counts, name)
            counter.inc(now - self._counted[name])
            self._counted[name] = now

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
                self.dead = self._faults >= FAULTS_IN_A_ROW
                self._fail_all()
                if self.dead:
                    return

    def _grown(self, answer: Answer) -> None:
        now = time.monotonic()
        self._metrics.step.observe(now - self._last_sign)
        self._last_sign, self._faults = now, 0
        entry = self._live.get(id(answer))
        if entry is None:  # cancelled
            return
        ticket, index = entry
        if answer.done:
            self._live.pop(id(answer), None)
        self._send(ticket, ticket.piece(index))

    def _fail_all(self) -> None:
        """Everything that was submitted is answered with an error, since its state is lost."""
        error = ApiError(500, "the engine failed: ask again", code="engine_failed")
        while self._live:
            _, (ticket, index) = self._live.popitem()
            ticket.jobs[index].answer.cancel()
            self._send(ticket, Piece(index, error=error))

    def _send(self, ticket: Ticket, piece: Piece) -> None:
        first = not self._news
        self._news.append((ticket, piece))
        if first:  # the loop is woken once for all that one step gives
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        while self._news:
            ticket, piece = self._news.popleft()
            ticket.deliver(piece)
