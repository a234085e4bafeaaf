"""Prompts of different lengths as the arrays of one prefill."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llava_jax.inference.buckets import cache_bucket, chunk_bucket, chunk_count, token_bucket
from llava_jax.inference.decoding import NO_TOKEN, Prompts
from llava_jax.inference.jobs import Job
from llava_jax.inference.sampling import Sampling
from llava_jax.models.cache import Chunks


@dataclass(frozen=True)
class PrefillShape:
    """The sizes that a prefill is compiled for.

    Attributes:
      tokens: that it reads.
      chunk: the most that follow each other in a chunk.
      window: cache slots that a chunk may look at.
    """

    tokens: int
    chunk: int
    window: int

    @property
    def chunks(self) -> int:
        return chunk_count(self.tokens, self.chunk)

    def pieces(self, job: Job) -> int:
        """Chunks that a prompt takes."""
        return -(-job.rest // self.chunk)


def take(wave: list[Job], size: int, more: bool) -> tuple[list[Job], PrefillShape]:
    """Takes the first prompts of a wave, as many as one call should read.

    size: of the cache. more: others wait behind the wave, that what is left of it can wait for.
    """
    longest = max(job.rest for job in wave)
    tokens = token_bucket(sum(job.rest for job in wave), longest, more)
    window = min(cache_bucket(max(job.length for job in wave)), size)
    shape = PrefillShape(tokens, chunk_bucket(longest), window)
    count, pieces = 0, 0
    for job in wave:
        tokens, pieces = tokens - job.rest, pieces + shape.pieces(job)
        if tokens < 0 or pieces > shape.chunks:
            break
        count += 1
    jobs = wave[:count]
    del wave[:count]
    return jobs, shape


def pack(jobs: Sequence[Job], shape: PrefillShape, rows: int) -> Prompts:
    """The arrays of a call; `rows` of the cache. What no prompt fills is dropped on the device."""
    prompts = _blank(shape, rows)
    chunks, start, number = prompts.chunks, 0, 0
    for job in jobs:
        part = np.s_[start : start + job.rest]
        prompts.input_ids[part] = job.request.input_ids[job.shared :]
        prompts.feature_ids[part] = job.feature_ids[job.shared :]
        chunks.rows[part], chunks.slots[part] = job.row, np.arange(job.shared, job.length)
        _fill_prompt(prompts, number, job, last=start + job.rest - 1)
        for first in range(start, start + job.rest, shape.chunk):
            places = np.arange(first, min(first + shape.chunk, start + job.rest))
            chunks.tokens[number, : len(places)] = places
            chunks.places[places] = number * shape.chunk + np.arange(len(places))
            chunks.sources[number, : job.length] = job.sources
            number += 1
        start += job.rest
    return prompts


def _blank(shape: PrefillShape, rows: int) -> Prompts:
    each = lambda value: np.full(shape.tokens, value, np.int32)
    prompt = lambda value: np.full(shape.chunks, value, np.int32)
    wide = lambda width, value: np.full((shape.chunks, width), value, np.int32)
    return Prompts(
        input_ids=each(0),
        feature_ids=each(NO_TOKEN),
        chunks=Chunks(
            rows=each(rows),
            slots=each(0),
            tokens=wide(shape.chunk, 0),
            places=each(0),
            sources=wide(shape.window, 0),
            copies=prompt(rows),
            window=shape.window,
        ),
        last=prompt(0),
        lengths=prompt(0),
        whole=wide(shape.window, NO_TOKEN),
        budget=prompt(0),
        sampling=Sampling.zeros(shape.chunks),
    )


def _fill_prompt(prompts: Prompts, number: int, job: Job, last: int) -> None:
    prompts.chunks.copies[number], prompts.last[number] = job.row, last
    prompts.lengths[number], prompts.budget[number] = job.length, job.budget
    prompts.whole[number, : job.length] = job.request.input_ids
    prompts.sampling.fill(number, job.request.params, job.stops, job.length)
