"""The host side of generation: requests into rows of a batch, tokens out chunk by chunk."""

import functools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llava_jax.errors import LlavaError
from llava_jax.inference import decoding
from llava_jax.inference.admission import Admission
from llava_jax.inference.answer import Answer, TokenLogprob
from llava_jax.inference.buckets import (
    IMAGES,
    TOKENS_AT_A_TIME,
    cache_bucket,
    chunk_bucket,
    count_bucket,
    image_bucket,
    length_bucket,
)
from llava_jax.inference.decoding import NO_TOKEN, TOKENS_PER_CALL, DecodeState
from llava_jax.inference.jobs import Job, Request
from llava_jax.inference.placement import place_state
from llava_jax.inference.prefill import PrefillShape, pack, take
from llava_jax.inference.sampling import MAX_STOP_IDS, Logprobs, SamplingParams
from llava_jax.inference.slots import RowSlots
from llava_jax.models.decoder import are_stacked
from llava_jax.models.images import features_in_turn
from llava_jax.models.llava import LlavaConfig, LlavaModel
from llava_jax.models.precision import compute_precision
from llava_jax.parallel.sharding import replicated


@dataclass
class Counts:
    """What an engine did so far.

    Attributes:
      prompt_tokens: of all requests; `shared_tokens` of them were copied and not computed.
      images: that requests had; `encoded_images` of them went through the vision encoder.
      compilations: device functions compiled; it stops growing once each bucket was seen.
    """

    requests: int = 0
    prompt_tokens: int = 0
    shared_tokens: int = 0
    answer_tokens: int = 0
    images: int = 0
    encoded_images: int = 0
    compilations: int = 0


class Engine:
    """Answers streams of requests: rows that end are given to waiting requests at once.

    Prompts that begin like one already in the cache copy it and compute only what follows;
    pictures are encoded once for as long as they stay in the feature store.

    Args:
      dtype: a key of `PRECISIONS`, or auto; the attribute is that of the activations.
      stop_ids: the model's own ends of an answer.
      kv_dtype: of the cache: None for that of the activations, or int8.
      mesh: of the devices that `params` are spread over; None for one device.
      image_slots: pictures whose features are kept.
    """

    def __init__(
        self,
        config: LlavaConfig,
        params: dict,
        dtype: str,
        stop_ids: Sequence[int],
        kv_dtype: str | None = None,
        mesh: Mesh | None = None,
        image_slots: int = 64,
    ):
        self.config = config
        self.stop_ids = tuple(stop_ids)
        self.counts = Counts()
        dtype, self._precision = compute_precision(dtype)
        self.dtype = dtype.name
        stacked = not params or are_stacked(params["decoder"])  # none yet: those of training
        self._model = LlavaModel(config, dtype, stacked=stacked)
        self._kv_dtype = jnp.dtype(kv_dtype or dtype)
        self._mesh = mesh
        self._image_slots = image_slots
        self.params = params
        self._new_state = jax.jit(self._empty_state, static_argnums=(0, 1))  # never whole anywhere
        self._encode = self._compile(decoding.encode, donate_argnums=1)
        self._prefill = self._compile(decoding.prefill, donate_argnums=1)
        self._decode = self._compile(decoding.decode, donate_argnums=1, static_argnames="window")
        self._prompt_logprobs = self._compile(decoding.prompt_logprobs)
        self._all_logits = self._compile(decoding.all_logits)

    @property
    def params(self) -> dict:
        """The model's parameters; others of the same shapes may be put in their place."""
        return self._params

    @params.setter
    def params(self, params: dict) -> None:
        self._params = params  # an argument of every call: a closure would compile it in
        self.forget()

    @property
    def rows(self) -> int:
        """Rows of the batch that the engine is set up for; 0 before the first request."""
        return self._admission.rows.count

    def forget(self) -> None:
        """Drops all that was computed from pictures and prompts."""
        self._state: DecodeState | None = None
        self._size = 0
        self._store: jax.Array | None = None
        self._admission = Admission(
            self._image_slots, self.config.image_token_id, self.config.tokens_per_tile
        )

    def _compile(self, function, **options):
        @functools.wraps(function)
        def counted(*arguments, **keywords):
            self.counts.compilations += 1  # runs when JAX traces, not when it calls
            with jax.default_matmul_precision(self._precision):
                told = function(self._model, *arguments, **keywords)
            # The state must come out as it went in: elsewhere, the next call would compile again.
            is_state = lambda leaf: isinstance(leaf, DecodeState)
            place = lambda leaf: self._place(leaf) if is_state(leaf) else leaf
            return jax.tree.map(place, told, is_leaf=is_state)

        return jax.jit(counted, **options)

    def _empty_state(self, rows: int, size: int) -> DecodeState:
        return self._place(DecodeState.empty(self._model, rows, size, self._kv_dtype))

    def _place(self, state: DecodeState) -> DecodeState:
        return state if self._mesh is None else place_state(state, self._mesh)

    def stops(self, params: SamplingParams) -> tuple[int, ...]:
        """The tokens that end an answer."""
        own = () if params.ignore_eos else self.stop_ids
        return tuple(sorted({*own, *params.stop_token_ids}))

    def check(self, request: Request) -> None:
        """Raises LlavaError where a request cannot be answered, whatever its pictures are."""
        length, limit = len(request.input_ids), self.config.decoder.max_position_embeddings
        vocabulary = self.config.decoder.vocab_size
        if not length:
            raise LlavaError("the prompt is empty: there is no token to answer")
        if length >= limit:
            raise LlavaError(
                f"the prompt has {length} tokens and leaves no room for an answer: the model reads "
                f"at most {limit}; shorten it or give fewer images"
            )
        if len(request.images) > self._image_slots:
            raise LlavaError(
                f"the prompt has {len(request.images)} images: at most {self._image_slots}"
            )
        stops = self.stops(request.params)
        if len(stops) > MAX_STOP_IDS:
            raise LlavaError(
                f"{len(stops)} stop tokens, the model's own included: at most {MAX_STOP_IDS}"
            )
        if stops and max(stops) >= vocabulary:
            raise LlavaError(
                f"stop token {max(stops)} is none of the model's: its ids go from 0 to "
                f"{vocabulary - 1}"
            )

    def run(self, requests: Iterable[tuple[Request, Answer]], batch_size: int) -> Iterator[Answer]:
        """Extends the answers of any number of requests, at most `batch_size` at a time.

        Requests are taken from `requests` as rows become free. Yields an answer each time it grew,
        the last time with `done` set. An answer whose request is wrong, or whose picture cannot be
        read, has its `error` set; the others are not touched.
        """
        return (told for told in self.steps(requests, batch_size) if isinstance(told, Answer))

    def steps(
        self, requests: Iterable[tuple[Request, Answer]], batch_size: int
    ) -> Iterator[Answer | jax.Array]:
        """As `run`, and before each wait for the device the array that it is going to wait for."""
        source, waiting, running = iter(requests), deque(), {}
        try:
            while True:
                # One more than there are rows, to know whether others follow.
                yield from self._take(source, waiting, batch_size + 1)
                if not waiting and not running:
                    return
                yield from self._admit(waiting, running, batch_size)
                if running:
                    yield from self._advance(running, more=bool(waiting))
        except GeneratorExit:  # the caller had enough
            raise
        except BaseException:
            self.forget()  # a call that was interrupted has taken the state with it
            raise

    def warm_up(self, batch_size: int, size: int) -> None:
        """Compiles all that requests need whose prompt and answer have at most `size` tokens.

        Then they compile nothing, in any number and mixture, at this batch size (log probabilities
        of prompts excepted).
        """
        self._reserve(count_bucket(batch_size), size, busy=False)
        blank = np.zeros((self.config.image.size, self.config.image.size, 3), np.uint8)
        nowhere = self._image_slots
        for count in IMAGES:
            self._encode_images({nowhere + i: blank for i in range(count)})
        for shape in self._prefill_shapes(batch_size, size):
            self._call_prefill([], shape)
        for window in self._windows():
            self._call_decode(np.zeros(self.rows, bool), 1, window)

    def _prefill_shapes(self, batch_size: int, size: int) -> list[PrefillShape]:
        """All that prompts of less than `size` tokens can lead to."""
        most = max(min(TOKENS_AT_A_TIME, batch_size * size), length_bucket(size))
        lengths = sorted({length_bucket(n) for n in range(1, most + 1)})
        chunks = {chunk_bucket(n): n for n in range(size, 0, -1)}  # and the shortest prompt
        return [
            PrefillShape(tokens, chunk, window)
            for chunk, longest in chunks.items()
            for tokens in lengths
            for window in self._windows()
            if min(tokens, window) >= longest
        ]

    def _windows(self) -> list[int]:
        """The numbers of cache slots that a call may look at."""
        return sorted({cache_bucket(n) for n in range(1, self._size + 1)})

    def _call_prefill(self, jobs: Sequence[Job], shape: PrefillShape):
        """First tokens and their log probabilities; the state goes on."""
        prompts = pack(jobs, shape, self.rows)
        *told, self._state = self._prefill(self.params, self._state, self._store, prompts)
        return told

    def _call_decode(self, running: np.ndarray, fewest: int, window: int):
        """More tokens and their log probabilities; the state goes on."""
        fewest = np.int32(fewest)
        *told, self._state = self._decode(self.params, self._state, running, fewest, window=window)
        return told

    def _take(self, source: Iterator, waiting: deque[Job], count: int) -> Iterator[Answer]:
        """Fills `waiting` up to `count` requests; yields the answers of those that are wrong."""
        limit = self.config.decoder.max_position_embeddings
        while len(waiting) < count:
            request, answer = next(source, (None, None))
            if request is None:
                return
            self.counts.requests += 1
            answer.prompt_tokens = length = len(request.input_ids)
            try:
                self.check(request)
                images = [image() for image in request.images]
            except LlavaError as error:
                answer.fail(error)
                yield answer
                continue
            budget = min(request.params.max_tokens, limit - length)
            waiting.append(Job(request, answer, images, self.stops(request.params), budget))

    def _admit(
        self, waiting: deque[Job], running: dict[int, Job], batch_size: int
    ) -> Iterator[Answer | jax.Array]:
        """Gives free rows to waiting requests, until either are few.

        A quarter of the rows or less is not worth a further call: they wait for rows that end.
        """
        rows, enough = count_bucket(batch_size), batch_size
        while waiting and len(running) < enough:
            if not self._reserve(rows, max(job.need for job in waiting), busy=bool(running)):
                return
            free = set(range(rows)) - set(running)
            wave, images = self._admission.wave(waiting, free, batch_size - len(running))
            self.counts.encoded_images += len(images)
            self._encode_images(images)
            while wave:
                before = len(wave)
                yield from self._read_some(wave, running, more=bool(waiting))
                if waiting and 2 * len(wave) < before:  # the few that did not fill a call
                    waiting.extendleft(reversed(wave))
                    break
            enough = batch_size - batch_size // 4

    def _reserve(self, rows: int, need: int, busy: bool) -> bool:
        """Makes a state of `rows` with room for `need` tokens; False while another is busy."""
        size = cache_bucket(need)
        if self._state is not None and self.rows == rows and size <= self._size:
            return True
        if not busy:
            self._state = None  # its memory must be free before the new one is made
            self._state = self._new_state(rows, size)
            self._admission.rows, self._size = RowSlots(rows, size), size
        return not busy

    def _encode_images(self, images: dict[int, np.ndarray]) -> None:
        """Fills slots of the feature store."""
        store = self._store
        if store is None:
            shape = (self._image_slots, self.config.tokens_per_tile)
            shape = (*shape, self.config.decoder.hidden_size)
            where = self._mesh and replicated(self._mesh)
            store = jnp.zeros(shape, self._model.dtype, device=where)
        waiting = list(images.items())
        while waiting:
            count = image_bucket(len(waiting))
            some, waiting = waiting[:count], waiting[count:]
            pixels = np.zeros((count, *some[0][1].shape), np.uint8)
            slots = np.full(count, self._image_slots, np.int32)
            for i, (slot, image) in enumerate(some):
                pixels[i], slots[i] = image, slot
            store = self._encode(self.params, store, pixels, slots)
        self._store = store

    def _read_some(
        self, wave: list[Job], running: dict[int, Job], more: bool
    ) -> Iterator[Answer | jax.Array]:
        """One prefill, of the first requests of a wave; with `more` behind it, a filled one."""
        jobs, shape = take(wave, self._size, more)
        tokens, logprobs = self._call_prefill(jobs, shape)
        for job in jobs:
            self._admission.rows.put(job.row, job.contents)
        yield tokens
        told = jax.device_get((tokens, _shown(jobs, logprobs)))
        # On the host: on the device, each shape of it would be compiled.
        tokens, logprobs = jax.tree.map(lambda x: x[:, None], told)
        number = 0
        for job in jobs:
            running[job.row] = job
            self.counts.images += len(job.images)
            self.counts.prompt_tokens += job.length
            self.counts.shared_tokens += job.shared
            self._tell_prompt(job)
            self._extend(job, number, tokens, logprobs, running)
            number += shape.pieces(job)
            yield job.answer

    def _tell_prompt(self, job: Job) -> None:
        """Log probabilities of the prompt, where they were asked for: a pass of their own."""
        count = job.request.params.prompt_logprobs
        if count is None:
            return
        pieces = -(-length_bucket(job.length) // decoding.POSITIONS_AT_A_TIME)
        padding = (0, pieces * decoding.POSITIONS_AT_A_TIME - job.length)
        ids = np.pad(job.request.input_ids, padding)[None]
        features = np.pad(job.feature_ids, padding, constant_values=NO_TOKEN)[None]
        targets = np.roll(ids, -1, axis=1)
        told = self._prompt_logprobs(self.params, self._store, ids, features, targets)
        tokens = job.request.input_ids[1:]
        job.answer.prompt_logprobs = _token_logprobs(jax.device_get(told), 0, tokens, count)

    def _advance(self, running: dict[int, Job], more: bool) -> Iterator[Answer | jax.Array]:
        """One decode call; with `more` requests waiting it ends when a quarter of the rows do."""
        longest = max(job.length + len(job.produced) for job in running.values())
        window = min(cache_bucket(longest + TOKENS_PER_CALL), self._size)
        mask = np.zeros(self.rows, bool)
        mask[list(running)] = True
        fewest = len(running) - len(running) // 4 if more else 1
        tokens, logprobs = self._call_decode(mask, fewest, window)
        yield tokens
        tokens, logprobs = jax.device_get((tokens, _shown(running.values(), logprobs)))
        for row, job in list(running.items()):
            self._extend(job, row, tokens, logprobs, running)
            yield job.answer

    def _extend(
        self, job: Job, i: int, tokens: np.ndarray, logprobs: Logprobs | None, running: dict
    ) -> None:
        """Gives a job the tokens of row `i`; frees its row when the answer is done."""
        new = tokens[i][tokens[i] != NO_TOKEN].tolist()
        count = job.request.params.logprobs
        told = () if count is None else _token_logprobs(logprobs, i, new, count)
        job.produced += new
        self.counts.answer_tokens += len(new)
        job.answer.extend(new, told)
        if len(job.produced) >= job.budget:
            job.answer.end()
        if job.answer.done:
            # The last token was never read.
            contents = np.concatenate([job.contents, np.array(job.produced[:-1], np.int64)])
            self._admission.rows.put(job.row, contents)
            del running[job.row]

    def logits(
        self, input_ids: np.ndarray, images: Sequence[np.ndarray], attention_mask: np.ndarray
    ) -> jax.Array:
        """Float32 logits [B, T, V].

        Args:
          input_ids: int[B, T], padded on either side.
          images: per row, float32[n, side, side, 3] (normalised) or uint8.
          attention_mask: int[B, T], 1 for real tokens.
        """
        (rows, length), padded = input_ids.shape, length_bucket(input_ids.shape[1])
        padding = ((0, count_bucket(rows) - rows), (0, padded - length))
        input_ids = np.pad(input_ids.astype(np.int32), padding)
        logits = self._all_logits(
            self.params,
            input_ids,
            _image_slots(images, rows + padding[0][1]),
            features_in_turn(input_ids == self.config.image_token_id),
            np.pad(attention_mask.astype(np.int32), padding),
        )
        return logits[:rows, :length]


def _shown(jobs: Iterable[Job], logprobs: Logprobs) -> Logprobs | None:
    """None, which need not be fetched, where no job asked for them."""
    return logprobs if any(job.request.params.logprobs is not None for job in jobs) else None


def _token_logprobs(told: Logprobs, row: int, tokens, count: int) -> list[TokenLogprob]:
    """Those of `tokens`, in the first places of a row of [R, T] log probabilities."""
    return [
        TokenLogprob(
            int(token),
            float(told.chosen[row, i]),
            dict(zip(told.top_ids[row, i, :count].tolist(), told.top[row, i, :count].tolist(),
                     strict=True)),
        )
        for i, token in enumerate(tokens)
    ]  # fmt: skip


def _image_slots(images: Sequence[Sequence[np.ndarray]], rows: int):
    """Each row's images, zeros behind them: [rows, I, ...], or None where no row has one."""
    slots = count_bucket(max(len(row) for row in images))
    if not slots:
        return None
    first = next(row[0] for row in images if len(row))
    batch = np.zeros((rows, slots, *first.shape), first.dtype)
    for row, of_row in enumerate(images):
        batch[row, : len(of_row)] = of_row if len(of_row) else 0
    return batch
