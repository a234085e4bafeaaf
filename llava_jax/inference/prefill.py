"""The next prefill: how many of the waiting jobs it reads, and its arrays.

Shapes come from a fixed set, so that compiled functions are used again.
"""

import bisect
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from llava_jax.inference.contrast import Contrast
from llava_jax.inference.decoding import NO_TOKEN, Prompts
from llava_jax.inference.jobs import Job, pages_of
from llava_jax.inference.sampling import Sampling
from llava_jax.models.cache import NO_PAGE, PAGE, Chunks
from llava_jax.models.taps import TEXT

SMALLEST_LENGTH = 16
SMALLEST_CACHE = 64
TOKENS_AT_A_TIME = 4096  # of prompts; a longer one is read in parts
TOKENS_OF_A_CALL = 256  # a call costs about as much as reading so many more: weights are read


def length_bucket(length: int, few: bool = False) -> int:
    """The shortest padded length that holds `length` tokens: 16, 24, 32, 48, 64, 96, 128, 192...

    Two sizes to each doubling: padding is at most a third, and there are few shapes to compile.
    With `few` there is one: 16, 32, 64, 128...
    """
    if length <= SMALLEST_LENGTH:
        return SMALLEST_LENGTH
    power = 1 << (length - 1).bit_length()  # the first that holds it
    return power * 3 // 4 if not few and length <= power * 3 // 4 else power


def token_bucket(total: int, least: int, more: bool, few: bool = False) -> int:
    """How many tokens the next call reads, of `total` that wait: at least `least`.

    If `more` prompts wait for a row, this is the next smaller size unless at least 7/8 are filled.
    """
    bucket = length_bucket(total, few)
    if more and 8 * total < 7 * bucket:
        # The one below: half, 2/3 or 3/4 of it.
        bucket = length_bucket(bucket // 2 if few else bucket * 5 // 8, few)
    return max(length_bucket(least, few), min(bucket, TOKENS_AT_A_TIME))


def chunk_bucket(longest: int) -> int:
    """The length of the chunks that prompts of at most `longest` are read in: 16, 64, 256...

    A prompt has at most four.
    """
    chunk = SMALLEST_LENGTH
    while 4 * chunk < longest:
        chunk *= 4
    return chunk


def chunk_count(tokens: int, chunk: int) -> int:
    """Number of chunks in a call of `tokens`: enough if they are three quarters full."""
    return max(4 * tokens // (3 * chunk), 1)


def batch_shape(batch_size: int, jobs: Iterable[Job], least: int = 0) -> tuple[int, int]:
    """Rows for `batch_size`, and the most tokens of a row: at least `least`, and all of a job's."""
    most = max([least, *(reading.most for job in jobs for reading in job.readings)])
    return count_bucket(batch_size), cache_bucket(most)


def pool_pages(jobs: Sequence[Job], rows: int, size: int, tokens: int | None) -> int:
    """Pages for the cache of so many rows.

    Args:
      jobs: at hand: there is room for as many of the longest as there are rows.
      size: there is room for rows of so many tokens, all at once.
      tokens: that the cache holds, no more and no fewer; None for as many as that.
    """
    if tokens is not None:
        return pages_of(tokens)
    each = sorted(pages_of(reading.most) for job in jobs for reading in job.readings)
    pages = max(sum(each[-rows:]), rows * pages_of(size), 8)
    step = (1 << (pages - 1).bit_length()) // 8  # four sizes to each doubling
    return -(-pages // step) * step


def cache_bucket(length: int) -> int:
    """Cache slots for `length` tokens: a power of two from 64, or 3/4 of one from 8192."""
    power = max(SMALLEST_CACHE, 1 << (length - 1).bit_length())
    return power * 3 // 4 if power > 4096 and length <= power * 3 // 4 else power


def window_bucket(length: int, size: int, few: bool = False) -> int:
    """Slots that a call looks at in rows of `size`, to see `length` of them.

    With `few` all of them or a quarter.
    """
    window = min(cache_bucket(length), size)
    if not few:
        return window
    quarter = max(size // 4, SMALLEST_CACHE)
    return size if window > quarter else min(quarter, size)


def windows_of(size: int, few: bool = False) -> list[int]:
    """Every `window_bucket` of rows of `size`, the smallest first."""
    return sorted({window_bucket(n, size, few) for n in range(1, size + 1)})


def count_bucket(count: int) -> int:
    """The smallest power of two from `count`, and 0 for 0: of rows, of tiles a row."""
    return 1 << (count - 1).bit_length() if count else 0


@dataclass(frozen=True)
class PrefillShape:
    """The sizes that a prefill is compiled for.

    Attributes:
      tokens: that it reads.
      chunk: the most tokens of a chunk.
      window: cache slots that a chunk may look at.
    """

    tokens: int
    chunk: int
    window: int

    @property
    def chunks(self) -> int:
        return chunk_count(self.tokens, self.chunk)

    def pieces(self, *jobs: Job) -> int:
        """Chunks that the prompts of jobs take, with those of their twins."""
        return sum(-(-reading.rest // self.chunk) for job in jobs for reading in job.readings)

    def holds(self, jobs: Iterable[Job]) -> bool:
        """Whether there are chunks enough for the prompts of jobs."""
        return self.pieces(*jobs) <= self.chunks


def prefill_shapes(batch_size: int, size: int, few: bool = False) -> list[PrefillShape]:
    """Every prefill shape that prompts shorter than `size` can need, the shortest first."""
    most = min(TOKENS_AT_A_TIME, max(batch_size * size, length_bucket(size, few)))
    lengths = sorted({length_bucket(n, few) for n in range(1, most + 1)})
    windows = windows_of(size, few)
    longest = min(size, TOKENS_AT_A_TIME)
    shortest = {chunk_bucket(n): n for n in range(longest, 0, -1)}  # prompt of each chunk length
    return [
        PrefillShape(tokens, chunk, window)
        for tokens in lengths
        for window in windows
        for chunk in sorted(shortest)
        if min(tokens, window) >= shortest[chunk]
        # A prompt has at most four chunks, and a call at most `batch_size` prompts.
        and tokens <= length_bucket(max(batch_size * 4 * chunk, SMALLEST_LENGTH), few)
    ]


def take_prompts(
    wave: list[Job], size: int, more: bool, few: bool = False
) -> tuple[list[Job], PrefillShape]:
    """Takes the first jobs of a wave, as many as one call should read; the first is not too long.

    As many as make it the cheapest for each token: a prompt of 3,060 tokens is read in a call of
    3,072, and the three of 30 tokens behind it in one of 96, not all in one of 4,096. A prompt
    and its twin are read in one call, in which their first token is chosen.

    Args:
      size: slots of a row of the cache.
      more: other jobs wait behind the wave, so what is left of it can wait for them.
      few: see `length_bucket`.
    """
    whole = list(itertools.takewhile(lambda job: rest_of(job) <= TOKENS_AT_A_TIME, wave))
    most = _shape_for(whole, size, more, few).tokens
    reads = [read for read in itertools.accumulate(map(rest_of, whole)) if read <= most]
    best = float("inf"), 0, None
    for tokens in sorted({length_bucket(read, few) for read in reads}):
        count = bisect.bisect_right(reads, tokens)  # as many as fit into so many tokens
        while not (own := _shape_for(whole[:count], size, False, few)).holds(whole[:count]):
            count -= 1
        cost = (own.tokens + TOKENS_OF_A_CALL) / reads[count - 1]
        if cost <= best[0]:
            best = cost, count, own
    _, count, shape = best
    jobs = wave[:count]
    del wave[:count]
    return jobs, shape


def rest_of(job: Job) -> int:
    """Tokens that are still to be read of a prompt and of its twin."""
    return sum(reading.rest for reading in job.readings)


def _shape_for(jobs: Sequence[Job], size: int, more: bool, few: bool) -> PrefillShape:
    """The shape that the first job fits into, and more jobs if that fills it."""
    waiting = [rest_of(job) for job in jobs]
    chunk = chunk_bucket(max(reading.rest for job in jobs for reading in job.readings))
    window = window_bucket(max(job.filled for job in jobs), size, few)
    shape = PrefillShape(token_bucket(sum(waiting), max(waiting), more, few), chunk, window)
    while not shape.holds(jobs[:1]):  # a pair has more ends that fill no chunk
        shape = dataclasses.replace(shape, tokens=length_bucket(shape.tokens + 1, few))
    return shape


def take_parts(job: Job, size: int, few: bool = False) -> Iterator[tuple[Job, PrefillShape]]:
    """The parts of a prompt that is too long for one call, as jobs; what is left is not too long.

    With a twin, both together are too long: the one with more left is read, but for its last token,
    from which the first of the answer is chosen. The tokens that are chosen after the parts mean
    nothing. Arguments as in `take_prompts`.
    """
    while rest_of(job) > TOKENS_AT_A_TIME:
        longer = max(job.readings, key=lambda reading: reading.rest)
        end = longer.read + min(TOKENS_AT_A_TIME, longer.rest - 1)
        request = dataclasses.replace(longer.request, input_ids=longer.ids[:end])
        part = dataclasses.replace(longer, request=request, budget=0, produced=[], twin=None)
        chunk, window = chunk_bucket(TOKENS_AT_A_TIME), window_bucket(end, size, few)
        yield part, PrefillShape(TOKENS_AT_A_TIME, chunk, window)
        longer.read = end


def pack_prompts(jobs: Sequence[Job], shape: PrefillShape, rows: int, taps: int = 1) -> Prompts:
    """The arrays of a call on a state of `rows`; the device drops what no prompt fills.

    taps: features that a token may mix (`ImageSpec.taps`).
    """
    prompts = _blank(shape, rows, taps)
    chunks, start, number = prompts.chunks, 0, 0
    first_chunks = {}
    for job in itertools.chain.from_iterable(job.readings for job in jobs):
        first_chunks[job.row] = number
        part = np.s_[start : start + job.rest]
        new, ids, pages = np.arange(job.read, job.filled), job.ids, np.array(job.pages)
        prompts.input_ids[part] = ids[new]
        prompts.feature_ids[part] = job.feature_ids[new]
        if taps > 1:
            prompts.feature_weights[part] = job.feature_weights[new]
        chunks.slots[part], chunks.pages[part] = new, pages[new // PAGE]
        _fill_prompt(prompts, number, job, ids, last=start + job.rest - 1)
        held = pages[: pages_of(job.filled)]
        for first in range(start, start + job.rest, shape.chunk):
            places = np.arange(first, min(first + shape.chunk, start + job.rest))
            chunks.tokens[number, : len(places)] = places
            chunks.places[places] = number * shape.chunk + np.arange(len(places))
            chunks.tables[number, : len(held)] = held
            number += 1
        start += job.rest
    return prompts.replace(contrast=pairs_of(jobs, shape.chunks, first_chunks))


def pack_tables(jobs: Iterable[Job], rows: int, window: int) -> np.ndarray:
    """int32[rows, window / PAGE]: the pages of the rows that jobs have, and of no other row."""
    tables = np.zeros((rows, window // PAGE), np.int32)
    for job in itertools.chain.from_iterable(job.readings for job in jobs):
        tables[job.row, : len(job.pages)] = job.pages
    return tables


def pairs_of(
    jobs: Iterable[Job], count: int, places: Mapping[int, int] | None = None
) -> Contrast | None:
    """The pairs of jobs with twins; None if there are none.

    Args:
      count: of the rows of logits.
      places: by row of the cache, its row of logits; by default the same one.
    """
    pairs = [job for job in jobs if job.twin]
    if not pairs:
        return None
    contrast = Contrast.none(count)
    for job in pairs:
        rows = [reading.row if places is None else places[reading.row] for reading in job.readings]
        contrast.pair(*rows, job.request.params)
    return contrast


def pack_whole(
    job: Job, length: int, taps: int = 1
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """A prompt as a row of its own, padded on the right: ids, feature ids and feature weights.

    taps: as in `pack_prompts`.

    Returns:
      int32[1, length], and as in `Prompts` the others, with a first axis of 1.
    """
    padding = (0, length - job.length)
    of_features = (padding, (0, 0)) if taps > 1 else padding
    weights = job.feature_weights
    return (
        np.pad(job.request.input_ids, padding)[None],
        np.pad(job.feature_ids, of_features, constant_values=TEXT)[None],
        None if weights is None else np.pad(weights, of_features)[None],
    )


def _blank(shape: PrefillShape, rows: int, taps: int) -> Prompts:
    each = lambda value: np.full(shape.tokens, value, np.int32)
    prompt = lambda value: np.full(shape.chunks, value, np.int32)
    wide = lambda width, value: np.full((shape.chunks, width), value, np.int32)
    mixed = (shape.tokens, taps)
    return Prompts(
        input_ids=each(0),
        feature_ids=each(TEXT) if taps == 1 else np.full(mixed, TEXT, np.int32),
        feature_weights=None if taps == 1 else np.zeros(mixed, np.float32),
        chunks=Chunks(
            slots=each(0),
            pages=each(NO_PAGE),
            tokens=wide(shape.chunk, 0),
            places=each(0),
            tables=wide(-(-shape.window // PAGE), 0),
        ),
        rows=prompt(rows),
        last=prompt(0),
        lengths=prompt(0),
        whole=wide(shape.window, NO_TOKEN),
        budget=prompt(0),
        sampling=Sampling.zeros(shape.chunks),
    )


def _fill_prompt(prompts: Prompts, number: int, job: Job, ids: np.ndarray, last: int) -> None:
    prompts.rows[number], prompts.last[number] = job.row, last
    prompts.lengths[number], prompts.whole[number, : len(ids)] = len(ids), ids
    prompts.budget[number] = job.budget - len(job.produced)
    prompts.sampling.fill(number, job.request.params, job.stops, job.length)
