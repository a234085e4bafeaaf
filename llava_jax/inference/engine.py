"""The host side of generation: requests into shape buckets, tokens out chunk by chunk."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import jax
import jax.numpy as jnp
import numpy as np

from llava_jax.errors import LlavaError
from llava_jax.inference.answer import Answer
from llava_jax.inference.buckets import count_bucket, length_bucket
from llava_jax.inference.decoding import NO_TOKEN, all_logits, decode, prefill
from llava_jax.inference.sampling import Sampling, SamplingParams
from llava_jax.models.llava import LlavaConfig, LlavaModel
from llava_jax.models.precision import compute_precision


@dataclass(frozen=True)
class Request:
    """One prompt as the model reads it, and how to answer it.

    Attributes:
      input_ids: int32[T] with the placeholder ids of the images.
      images: for each image, in the order of the placeholders, a function that gives it as
        uint8[side, side, 3]; called when the request's batch is put together.
    """

    input_ids: np.ndarray
    images: tuple[Callable[[], np.ndarray], ...]
    params: SamplingParams


class Engine:
    """Answers batches of requests with one prefill and a few decode calls, all compiled once.

    Attributes:
      params: the model's parameters; others of the same shapes may be put in their place.
      compilations: how many device functions were compiled so far; it stops growing once each
        bucket of shapes was seen.
    """

    def __init__(self, config: LlavaConfig, params: dict, dtype: str, stop_ids: Sequence[int]):
        self.config = config
        self.compilations = 0
        self.stop_ids = tuple(stop_ids)
        self.params = params  # an argument of every call: a closure would compile it in
        dtype, self._precision = compute_precision(dtype)
        self._model = LlavaModel(config, dtype)
        self._prefill = self._compile(prefill, static_argnames="cache_size")
        self._decode = self._compile(decode, donate_argnums=1)
        self._all_logits = self._compile(all_logits)

    def _compile(self, function, **options):
        @functools.wraps(function)
        def counted(*arguments, **keywords):
            self.compilations += 1  # runs when JAX traces, not when it calls
            with jax.default_matmul_precision(self._precision):
                return function(self._model, *arguments, **keywords)

        return jax.jit(counted, **options)

    def check(self, request: Request) -> None:
        """Raises LlavaError where the prompt leaves no position for an answer."""
        length, limit = len(request.input_ids), self.config.decoder.max_position_embeddings
        if not length:
            raise LlavaError("the prompt is empty: there is no token to answer")
        if length >= limit:
            raise LlavaError(
                f"the prompt has {length} tokens and leaves no room for an answer: the model reads "
                f"at most {limit}; shorten it or give fewer images"
            )

    def stream(self, requests: Sequence[Request], answers: Sequence[Answer]) -> Iterator[None]:
        """Extends each request's answer as tokens come, and yields after each device call.

        All requests make one batch. Ends when every answer is done or out of tokens.
        """
        batch, cache_size = self._batch(requests)
        stop_ids = jnp.array(self.stop_ids, jnp.int32)
        first, state = self._prefill(self.params, **batch, stop_ids=stop_ids, cache_size=cache_size)
        budget = batch["budget"] - 1
        chunk = np.asarray(first)[:, None]
        while True:
            for answer, tokens in zip(answers, chunk, strict=False):
                answer.extend(tokens[tokens != NO_TOKEN])
            yield
            stopped = np.ones(len(budget), bool)
            stopped[: len(answers)] = [answer.done for answer in answers]
            if (stopped | (budget <= 0)).all():
                return
            tokens, state = self._decode(self.params, state, stopped, stop_ids)
            chunk = np.asarray(tokens)
            budget = budget - chunk.shape[1]

    def _batch(self, requests: Sequence[Request]) -> tuple[dict, int]:
        """Arguments of `prefill` and the cache size, padded to the buckets of the largest."""
        rows = count_bucket(len(requests))
        lengths = _column([len(r.input_ids) for r in requests], rows, np.int32)
        room = self.config.decoder.max_position_embeddings - lengths
        budget = _column([r.params.max_new_tokens for r in requests], rows, np.int32)
        budget = np.minimum(budget, room)
        input_ids = np.zeros((rows, length_bucket(int(lengths.max()))), np.int32)
        for row, request in enumerate(requests):
            input_ids[row, : lengths[row]] = request.input_ids
        batch = {
            "input_ids": input_ids,
            "lengths": lengths,
            "images": self._image_slots([[image() for image in r.images] for r in requests], rows),
            "budget": budget,
            "sampling": Sampling(
                _column([r.params.temperature for r in requests], rows, np.float32),
                _column([r.params.top_p for r in requests], rows, np.float32),
                _column([r.params.seed for r in requests], rows, np.uint32),
            ),
        }
        return batch, length_bucket(input_ids.shape[1] + int(budget.max()))

    def _image_slots(self, images: Sequence[Sequence[np.ndarray]], rows: int):
        """Each row's images, zeros behind them: [rows, I, ...], or None where no row has one."""
        slots = count_bucket(max(len(row) for row in images))
        if not slots:
            return None
        first = next(row[0] for row in images if len(row))
        batch = np.zeros((rows, slots, *first.shape), first.dtype)
        for row, of_row in enumerate(images):
            batch[row, : len(of_row)] = of_row if len(of_row) else 0
        return batch

    def run(
        self, requests: Sequence[Request], answers: Sequence[Answer], batch_size: int
    ) -> Iterator[int]:
        """Answers any number of requests, those of like shape together.

        Yields after each batch how many were in it.
        """
        for rows in like_shapes(requests, batch_size):
            for _ in self.stream([requests[row] for row in rows], [answers[row] for row in rows]):
                pass
            yield len(rows)

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
        logits = self._all_logits(
            self.params,
            np.pad(input_ids.astype(np.int32), padding),
            self._image_slots(images, rows + padding[0][1]),
            np.pad(attention_mask.astype(np.int32), padding),
        )
        return logits[:rows, :length]


def like_shapes(requests: Sequence[Request], batch_size: int) -> Iterator[list[int]]:
    """Indices of at most `batch_size` requests at a time, of like shape, so little is padding."""

    def slots(row):
        return count_bucket(len(requests[row].images))

    def shape(row):
        return slots(row), length_bucket(len(requests[row].input_ids))

    for _, group in groupby(sorted(range(len(requests)), key=shape), key=slots):
        rows = list(group)
        for start in range(0, len(rows), batch_size):
            yield rows[start : start + batch_size]


def _column(values: Sequence, rows: int, dtype) -> np.ndarray:
    """One value a row, zeros in the rows that fill up the bucket."""
    column = np.zeros(rows, dtype)
    column[: len(values)] = values
    return column
