"""The host side of generation: jobs into rows of a batch, tokens out chunk by chunk."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh

from llava_jax.inference.admission import Admission
from llava_jax.inference.answer import Answer, token_logprobs
from llava_jax.inference.contrast import Contrast
from llava_jax.inference.counts import Counts
from llava_jax.inference.decoding import NO_TOKEN, TOKENS_PER_CALL, Prompts
from llava_jax.inference.device import Device, all_calls, compile_all
from llava_jax.inference.jobs import Job, Queue, Source, rows_of, that_fit
from llava_jax.inference.paging import check_cache_tokens
from llava_jax.inference.prefill import (
    PrefillShape,
    batch_shape,
    length_bucket,
    pack_prompts,
    pack_tables,
    pack_whole,
    pairs_of,
    pool_pages,
    take_parts,
    take_prompts,
    window_bucket,
)
from llava_jax.inference.sampling import Logprobs
from llava_jax.inference.scoring import POSITIONS_AT_A_TIME
from llava_jax.inference.tracing import Tracing
from llava_jax.models.llava import LlavaConfig

PICTURE_THREADS = 4  # that read pictures while the device computes
IDLE = 0.05  # seconds between two looks at a source that is silent
LOADING = 0.002  # and at pictures that are being read


@dataclass(frozen=True)
class Grown:
    """An answer has new tokens, or has ended: this comes once with `answer.done`."""

    answer: Answer


@dataclass(frozen=True)
class Waiting:
    """The engine cannot go on before `ready()`: it waits for the device, a picture or a request.

    Attributes:
      idle: seconds after which it should be asked again, as it waits for a picture or a request; 0
        if it waits for the device.
      source: of the request that an idle engine waits for.
    """

    ready: Callable[[], bool]
    idle: float = 0.0
    source: Source | None = None


class Engine:
    """Answers streams of requests; a row that ends is given to a waiting request at once.

    A prompt that begins like one in the cache uses its pages and computes only the rest. A picture
    is encoded once for as long as its tiles stay in the feature store. A request with contrast
    takes two rows, also of a batch of one.

    All rows share the pages of the cache, and take them as they grow. If there are none left, the
    job that was admitted last gives way: it waits until another has ended, and is read again,
    prompt and answer so far.

    Args:
      dtype: a key of `PRECISIONS`, or auto; the attribute is the dtype of the activations.
      kv_dtype: of the cache: None for that of the activations, or int8.
      mesh: of the devices that `params` are spread over; None for one device.
      lookup: tokens that are guessed of each row at a time, see lookup.py; 0 is off.
      cache_tokens: that the cache holds, of all rows together; None for as many as the requests at
        hand may need.
    """

    def __init__(
        self,
        config: LlavaConfig,
        params: dict,
        dtype: str,
        kv_dtype: str | None = None,
        mesh: Mesh | None = None,
        lookup: int = 0,
        cache_tokens: int | None = None,
    ):
        check_cache_tokens(cache_tokens)
        self.config, self.cache_tokens = config, cache_tokens
        self.device = Device(config, params, dtype, kv_dtype, mesh, lookup)
        self.dtype = self.device.dtype
        self._counts = Counts()
        self._pool = ThreadPoolExecutor(PICTURE_THREADS, "pictures")
        self._few, self._least = False, 0  # see warm_up
        self._call_tokens = TOKENS_PER_CALL * (1 + lookup)  # that a decode call adds to a row
        self._full = False  # a job gave way, and none has ended since
        self.forget()

    @property
    def counts(self) -> Counts:
        return dataclasses.replace(self._counts, compilations=self.device.compilations)

    @property
    def params(self) -> dict:
        """The model's parameters; others of the same shapes may be put in their place."""
        return self.device.params

    @params.setter
    def params(self, params: dict) -> None:
        self.device.params = params
        self.forget()

    @property
    def rows(self) -> int:
        """Rows of the batch that the engine is set up for; 0 before the first request."""
        return self.device.rows

    @property
    def cache_use(self) -> float:
        """Share of the cache's pages that jobs have now."""
        return self._admission.pages.share_in_use

    def forget(self) -> None:
        """Drops everything that was computed from pictures and prompts."""
        self.device.forget()
        self._admission = Admission(self.config, self.device.tile_slots)

    def run(self, jobs: Source | Iterable[Job], batch_size: int) -> Iterator[Answer]:
        """Extends the answers of any number of jobs, in `batch_size` rows at a time.

        Jobs are taken from a source as rows become free. Yields an answer each time it grew, the
        last time with `done` set. If a picture cannot be read, the `error` of its answer is set;
        the others are not affected.
        """
        for event in self.steps(jobs, batch_size):
            if isinstance(event, Grown):
                yield event.answer
            elif event.idle:
                event.source.wait(event.idle)

    def steps(self, jobs: Source | Iterable[Job], batch_size: int) -> Iterator[Grown | Waiting]:
        """Like `run`, but also yields before it waits for something.

        A generator that is asked again too early blocks, unless it is idle.
        """
        queue, running = Queue(jobs, self._pool), {}
        try:
            while not queue.ended or queue.jobs or running:
                # One more than there are rows, to know whether others follow.
                self._counts.requests += queue.fill(batch_size + 1)
                rows = max([batch_size, *(len(job.readings) for job in queue.jobs)])
                going_on = [job for job in running.values() if not job.answer.cancelled]
                jobs = queue.ready(rows - len(rows_of(going_on)))
                yield from map(Grown, queue.remove_ended())
                yield from self._remove_cancelled(running)
                # One may be cancelled at any moment.
                jobs = that_fit(jobs, rows - len(rows_of(running.values())))
                yield from self._admit(jobs, queue, running, rows)
                if running:
                    self._grow(running, queue)
                    yield from self._advance(running, more=bool(queue.jobs))
                elif queue.jobs or not queue.ended:
                    ready = lambda: any(job.loaded for job in queue.jobs)
                    yield Waiting(ready, LOADING if queue.jobs else IDLE, queue.source)
        except GeneratorExit:  # the caller had enough
            raise
        except BaseException:
            self.forget()  # a call that was interrupted has taken the state with it
            running.clear()
            raise
        finally:
            for job in list(running.values()):
                self._free(job, running)
            queue.close()

    def warm_up(
        self,
        batch_size: int,
        size: int,
        report: Callable[[int, int], None] = lambda *_: None,
        few: bool = False,
        contrast: bool = False,
        traces: bool = False,
    ) -> None:
        """Compiles everything for requests whose prompt and answer have at most `size` tokens.

        Then they compile nothing, in any number and mixture, at this batch size (log probabilities
        of prompts excepted). The cache keeps this size from now on.

        Args:
          report: called with the numbers of functions that are compiled and of all.
          few: a quarter of the shapes, with more padding: quick to start, slower to answer.
          contrast: for requests with contrast too, in a batch of at least two rows.
          traces: for requests whose answer is traced, too.
        """
        self._few, self._least = few, size
        self._reserve(batch_size, [], busy=False)
        device = self.device

        def prefill(shape: PrefillShape, pairs: bool = False) -> jax.stages.Lowered:
            contrast = Contrast.none(shape.chunks) if pairs else None
            return device.lower_prefill(self._pack([], shape).replace(contrast=contrast))

        programs = {
            "encode": device.lower_encode,
            "decode": device.lower_decode,
            "prefill": prefill,
            "decode pairs": functools.partial(device.lower_decode, pairs=True),
            "prefill pairs": functools.partial(prefill, pairs=True),
            "trace": device.lower_trace,
        }
        calls = all_calls(batch_size, device.size, few, contrast, traces)
        report(0, len(calls))
        lowered = (programs[function](shape) for function, shape in calls)
        compile_all(lowered, lambda number: report(number, len(calls)))

    def _remove_cancelled(self, running: dict[int, Job]) -> Iterator[Grown]:
        for job in [job for job in running.values() if job.answer.cancelled]:
            job.answer.end()
            self._end(job, running)
            yield Grown(job.answer)

    def _admit(
        self, jobs: list[Job], queue: Queue, running: dict[int, Job], batch_size: int
    ) -> Iterator[Grown | Waiting]:
        """Gives free rows to jobs that are ready, until few of either are left.

        Refilling a quarter of the rows or fewer is not worth a prefill: the jobs wait for more rows
        to finish.
        """
        if not running:
            self._full = False
        enough = 0 if self._full else batch_size
        while queue.jobs and len(taken := rows_of(running.values())) < enough:
            jobs = [job for job in jobs if not job.answer.done]
            if not (jobs := (yield from self._trace(jobs, queue, 1 if running else batch_size))):
                return
            if not self._reserve(batch_size, queue.jobs, busy=bool(running)):
                return
            free = set(range(self.rows)) - set(taken)
            wave, tiles = self._admission.wave(jobs, free, self._call_tokens)
            self._counts.encoded_images += len(tiles)
            self.device.encode(tiles)  # also without a wave: they have their slots
            if not wave:
                return
            queue.remove(wave)
            try:
                while wave:
                    before = len(wave)
                    yield from self._read_some(wave, running, more=bool(queue.jobs))
                    if queue.jobs and 2 * len(wave) < before:  # the few that did not fill a call
                        queue.put_back(wave)
                        break
            finally:
                for job in wave:
                    self._admission.put_back(job)
            enough = batch_size - batch_size // 4
            jobs = queue.ready(batch_size - len(rows_of(running.values())))
            yield from map(Grown, queue.remove_ended())

    def _reserve(self, batch_size: int, jobs: Sequence[Job], busy: bool) -> bool:
        """Makes a state for a batch and the jobs at hand; False if the old one is busy.

        The old one is kept if it has half of the pages. Another would know no prompt, and must be
        compiled for; jobs often share pages, rarely need all that they may, and can wait.
        """
        device = self.device
        rows, size = batch_shape(batch_size, jobs, self._least)
        pages = pool_pages(jobs, rows, self._least and size, self.cache_tokens)
        least = max([pages // 2, *(job.pages_at_most for job in jobs)])
        fits = self.rows == rows and device.pages >= least and device.widen(size)
        if not fits and not busy:
            device.reserve(rows, pages, size)
            self._admission.resize(pages)
        return fits or not busy

    def _read_some(
        self, wave: list[Job], running: dict[int, Job], more: bool
    ) -> Iterator[Grown | Waiting]:
        """One prefill of the first jobs of a wave; if `more` wait behind it, a filled one."""
        for part, shape in take_parts(wave[0], self.device.size, self._few):
            self.device.prefill(self._pack([part], shape))
        jobs, shape = take_prompts(wave, self.device.size, more, self._few)
        tokens, logprobs = self.device.prefill(self._pack(jobs, shape))
        running.update((job.row, job) for job in jobs)
        yield Waiting(tokens.is_ready)
        outputs = jax.device_get((tokens, _shown(jobs, logprobs)))
        # On the host: on the device, each shape of it would be compiled.
        tokens, logprobs = jax.tree.map(lambda x: x[:, None], outputs)
        number = 0
        for job in jobs:
            if not job.produced:  # it is read for the first time
                self._counts.images += len(job.request.pictures)
                self._counts.prompt_tokens += job.length
                self._counts.shared_tokens += job.shared
                self._add_prompt_logprobs(job)
            pieces = shape.pieces(job)
            self._extend(job, number, tokens, logprobs, running)
            number += pieces
            yield Grown(job.answer)

    def _grow(self, running: dict[int, Job], queue: Queue) -> None:
        """Pages for what the next call adds to each row; the latest jobs give way if it must be."""
        for job in list(running.values()):
            while job.row in running and not self._admission.grow(job, self._call_tokens):
                *_, latest = running.values()
                self._free(latest, running)
                queue.put_back([latest])
                self._counts.put_back += 1
                self._full = True

    def _trace(self, jobs: list[Job], queue: Queue, most: int) -> Iterator[Grown | Waiting]:
        """Traces answers that are given, which take no row -> the jobs that have none."""
        traced = [job for job in jobs if job.request.traced][:most]
        queue.remove(traced)
        for job in traced:
            tracing = Tracing(job, self.device, self._admission, self._counts, self._few)
            yield Waiting(tracing.is_ready)
            tracing.finish()
            yield Grown(job.answer)
        return [job for job in jobs if not job.request.traced]

    def _pack(self, jobs: Sequence[Job], shape: PrefillShape) -> Prompts:
        return pack_prompts(jobs, shape, self.rows, self.config.image.taps)

    def _add_prompt_logprobs(self, job: Job) -> None:
        """Log probabilities of the prompt, if they were asked for: a pass of their own."""
        count = job.request.params.prompt_logprobs
        if count is None:
            return
        pieces = -(-length_bucket(job.length) // POSITIONS_AT_A_TIME)
        ids, *features = pack_whole(job, pieces * POSITIONS_AT_A_TIME, self.config.image.taps)
        logprobs = self.device.prompt_logprobs(ids, *features, np.roll(ids, -1, axis=1))
        tokens = job.request.input_ids[1:]
        job.answer.prompt_logprobs = token_logprobs(jax.device_get(logprobs), 0, tokens, count)

    def _advance(self, running: dict[int, Job], more: bool) -> Iterator[Grown | Waiting]:
        """One decode call; with `more` jobs waiting it ends when a quarter of the rows do."""
        longest = max(reading.filled for job in running.values() for reading in job.readings)
        window = window_bucket(longest + self._call_tokens, self.device.size, self._few)
        tables = pack_tables(running.values(), self.rows, window)
        mask, rows = np.zeros(self.rows, bool), rows_of(running.values())
        mask[rows] = True
        fewest = len(rows) - len(rows) // 4 if more else 1
        contrast = pairs_of(running.values(), self.rows)
        tokens, logprobs, drafts = self.device.decode(mask, fewest, tables, contrast)
        yield Waiting(tokens.is_ready)
        outputs = tokens, _shown(running.values(), logprobs), drafts
        tokens, logprobs, drafts = jax.device_get(outputs)
        self._counts.add(drafts, list(running))
        for row, job in list(running.items()):
            self._extend(job, row, tokens, logprobs, running)
            yield Grown(job.answer)

    def _extend(
        self, job: Job, i: int, tokens: np.ndarray, logprobs: Logprobs | None, running: dict
    ) -> None:
        """Gives a job the tokens of row `i`; frees its row when the answer is done."""
        new = tokens[i][tokens[i] != NO_TOKEN].tolist()
        count = job.request.params.logprobs
        of_new = () if count is None else token_logprobs(logprobs, i, new, count)
        job.produced += new
        self._counts.answer_tokens += len(new)
        job.answer.extend(new, of_new)
        if len(job.produced) >= job.budget or job.answer.cancelled:
            job.answer.end()
        if job.answer.done:
            self._end(job, running)

    def _end(self, job: Job, running: dict[int, Job]) -> None:
        self._free(job, running)
        self._full = False
        for reading in job.readings:
            reading.tiles = []

    def _free(self, job: Job, running: dict[int, Job]) -> None:
        self._admission.freed(job)
        del running[job.row]

    def logits(self, *inputs: np.ndarray | None) -> jax.Array:
        """Float32 logits [B, T, V] of whole sequences; arguments as in `Device.logits`."""
        return self.device.logits(*inputs)


def _shown(jobs: Iterable[Job], logprobs: Logprobs) -> Logprobs | None:
    """`logprobs`, or None (nothing to fetch) if no job asked for them."""
    return logprobs if any(job.request.params.logprobs is not None for job in jobs) else None
