"""The next prefill: which jobs it reads, into which rows, what they share, and its arrays.

Shapes come from a fixed set, so that compiled functions are used again.

S side of a tile, P features of a tile, T tokens of a prompt.
"""

from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from llava_jax.inference.decoding import NO_TOKEN, TILE_SLOTS, Prompts
from llava_jax.inference.jobs import Job
from llava_jax.inference.sampling import Sampling
from llava_jax.models.cache import Chunks

NOTHING = np.iinfo(np.int64).min  # in no prompt's contents
SMALLEST_LENGTH = 16
SMALLEST_CACHE = 64
TOKENS_AT_A_TIME = 4096  # of prompts, read at once unless one prompt is longer


def length_bucket(length: int, few: bool = False) -> int:
    """The shortest padded length that holds `length` tokens: 16, 24, 32, 48, 64, 96, 128, 192...

    Two sizes to each doubling: padding is at most a third, and there are few shapes to compile.
    With `few` there is one: 16, 32, 64, 128...
    """
    if length <= SMALLEST_LENGTH:
        return SMALLEST_LENGTH
    power = 1 << (length - 1).bit_length()  # the first that holds it
    return power * 3 // 4 if not few and length <= power * 3 // 4 else power


def token_bucket(total: int, longest: int, more: bool, few: bool = False) -> int:
    """How many tokens the next call reads, of `total` that wait in prompts of at most `longest`.

    If `more` prompts wait for a row, this is the next smaller size unless at least 7/8 are filled.
    """
    bucket = length_bucket(total, few)
    if more and 8 * total < 7 * bucket:
        # The one below: half, 2/3 or 3/4 of it.
        bucket = length_bucket(bucket // 2 if few else bucket * 5 // 8, few)
    return max(length_bucket(longest, few), min(bucket, TOKENS_AT_A_TIME))


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
    """Rows for `batch_size`, and slots of a row, at least `least`, for each of the jobs."""
    need = max(job.length + job.budget for job in jobs)
    return count_bucket(batch_size), cache_bucket(max(need, least))


def cache_bucket(length: int) -> int:
    """Cache slots for `length` tokens: a power of two from 64."""
    return max(SMALLEST_CACHE, 1 << (length - 1).bit_length())


def window_bucket(length: int, size: int, few: bool = False) -> int:
    """Slots that a call looks at in rows of `size`, to see `length` of them.

    With `few` all of them or a quarter.
    """
    window = min(cache_bucket(length), size)
    if not few:
        return window
    quarter = max(size // 4, SMALLEST_CACHE)
    return size if window > quarter else min(quarter, size)


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

    def pieces(self, job: Job) -> int:
        """Chunks that a prompt takes."""
        return -(-job.rest // self.chunk)


def prefill_shapes(batch_size: int, size: int, few: bool = False) -> list[PrefillShape]:
    """Every prefill shape that prompts shorter than `size` can need, the shortest first."""
    most = max(min(TOKENS_AT_A_TIME, batch_size * size), length_bucket(size, few))
    lengths = sorted({length_bucket(n, few) for n in range(1, most + 1)})
    windows = sorted({window_bucket(n, size, few) for n in range(1, size + 1)})
    shortest = {chunk_bucket(n): n for n in range(size, 0, -1)}  # prompt of each chunk length
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
    """Takes the first jobs of a wave, as many as one call should read.

    Args:
      size: slots of a row of the cache.
      more: other jobs wait behind the wave, so what is left of it can wait for them.
      few: see `length_bucket`.
    """
    longest = max(job.rest for job in wave)
    tokens = token_bucket(sum(job.rest for job in wave), longest, more, few)
    window = window_bucket(max(job.length for job in wave), size, few)
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


def pack_prompts(jobs: Sequence[Job], shape: PrefillShape, rows: int) -> Prompts:
    """The arrays of a call on a cache of `rows`; the device drops what no prompt fills."""
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


class TileSlots:
    """Slots of the feature store by the content of tiles; the least recently used is replaced.

    Each tile also has a number that no other content ever gets, so that prompts can be compared as
    rows of numbers.
    """

    def __init__(self, count: int):
        self._free = list(range(count))
        self._held: OrderedDict[bytes, tuple[int, int]] = OrderedDict()  # digest -> slot, number
        self._numbers = 0

    def find(self, digest: bytes) -> tuple[int, int] | None:
        """(slot, number) of a tile that is in the store, now the most recently used."""
        if digest not in self._held:
            return None
        self._held.move_to_end(digest)
        return self._held[digest]

    def add(self, digest: bytes, pinned: Collection[int]) -> tuple[int, int] | None:
        """(slot, number) for a new tile; None if every slot is one of `pinned`."""
        if not self._free:
            oldest = next((d for d, (slot, _) in self._held.items() if slot not in pinned), None)
            if oldest is None:
                return None
            self._free.append(self._held.pop(oldest)[0])
        self._numbers += 1
        self._held[digest] = self._free.pop(), self._numbers
        return self._held[digest]


class RowSlots:
    """The contents of the cache's rows, and which row was used least recently.

    A prompt is known by its `contents`, int64[T]: the ids of its text tokens, and numbers below
    zero, one for each feature of each tile, for the tokens of a picture. If two prompts begin with
    equal contents, they have equal keys and values there.
    """

    def __init__(self, count: int, size: int):
        self.count = count
        self._contents = np.full((count, size), NOTHING, np.int64)
        self._used = [0] * count
        self._clock = 0

    def donor(self, contents: np.ndarray, planned: dict[int, np.ndarray]) -> tuple[int, int]:
        """The row sharing the longest prefix with the prompt, and the length of the prefix.

        The last token is excluded: its hidden state is needed to choose the answer's first token.

        Args:
          planned: by row, contents that will replace those it holds.
        """
        wanted = contents[:-1]
        shared = common_prefixes(self._contents[:, : len(wanted)], wanted)
        for row, other in planned.items():
            shared[row] = common_prefixes(other[None, : len(wanted)], wanted)[0]
        row = int(np.argmax(shared))
        self.touch(row)
        return row, int(shared[row])

    def put(self, row: int, contents: np.ndarray) -> None:
        self._contents[row] = NOTHING
        self._contents[row, : len(contents)] = contents
        self.touch(row)

    def touch(self, row: int) -> None:
        """Makes a row the most recently used."""
        self._clock += 1
        self._used[row] = self._clock

    def oldest(self, rows: Collection[int]) -> int:
        """The least recently used of `rows`."""
        return min(rows, key=self._used.__getitem__)


def common_prefixes(rows: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """int[n]: the length of the common prefix of each of rows [n, at most T] with [T]."""
    different = rows != wanted[: rows.shape[1]]
    if not different.shape[1]:
        return np.zeros(len(rows), int)
    return np.where(different.any(axis=1), different.argmax(axis=1), different.shape[1])


class Admission:
    """Gives jobs their rows of the cache and their slots of the feature store.

    Args:
      image_token_id: the placeholder id.
      tokens_per_tile: P.
    """

    def __init__(self, image_token_id: int, tokens_per_tile: int):
        self._tiles = TileSlots(TILE_SLOTS)
        self._rows = RowSlots(0, 0)
        self._image_token_id, self._tokens_per_tile = image_token_id, tokens_per_tile

    @property
    def rows(self) -> int:
        """Rows of the cache."""
        return self._rows.count

    def resize(self, rows: int, size: int) -> None:
        """The cache is a new one, of `rows` with `size` slots each; its rows hold nothing."""
        self._rows = RowSlots(rows, size)

    def filled(self, job: Job) -> None:
        """The job's prompt is in its row now."""
        self._rows.put(job.row, job.contents)

    def freed(self, job: Job) -> None:
        """The job's row can be given away; until then it holds the prompt and its answer."""
        # The last token was chosen, but never read.
        answer = np.array(job.produced[:-1], np.int64)
        self._rows.put(job.row, np.concatenate([job.contents, answer]))

    def wave(
        self, jobs: Sequence[Job], free: Collection[int]
    ) -> tuple[list[Job], dict[int, np.ndarray]]:
        """Gives a row of `free` to each of the first jobs, as many as can be read now.

        A prompt may share its beginning with a row, or with a prompt earlier in the wave; it must
        not be read before that one.

        Returns:
          The jobs, and the tiles that are to be encoded first, by slot.
        """
        wave: dict[int, Job] = {}  # by row
        pinned, tiles = set(), {}
        needed = set()  # rows whose present contents are to be copied from
        for job in jobs:
            if not self._place_tiles(job, pinned, tiles):
                break
            planned = {row: other.contents for row, other in wave.items()}
            donor, shared = self._rows.donor(job.contents, planned)
            rows = set(free) - set(wave) - needed
            others = rows - {donor} if shared else rows
            if not rows:
                break
            job.row = self._rows.oldest(others or rows)
            # In its own row a prompt finds what it shares in place; otherwise it is copied there.
            job.shared, job.rest = shared, job.length - shared
            job.sources = np.full(job.length, job.row, np.int32)
            if shared:
                needed.add(donor)
                source = wave[donor].sources if donor in wave else np.full(shared, donor)
                job.sources[:shared] = source[:shared]
            wave[job.row] = job
        return list(wave.values()), tiles

    def _place_tiles(self, job: Job, pinned: set[int], tiles: dict[int, np.ndarray]) -> bool:
        """Finds a slot for each tile of a job; the tiles to be encoded go into `tiles`, by slot.

        False if the jobs of the wave before it need all slots.
        """
        per_tile, features, contents = self._tokens_per_tile, [], []
        for picture, future in zip(job.request.pictures, job.tiles, strict=True):
            slots, numbers = [], []
            for digest, tile in future.result():
                found = self._tiles.find(digest)
                if found is None:
                    found = self._tiles.add(digest, pinned)
                    if found is None:
                        return False
                    tiles[found[0]] = tile
                pinned.add(found[0])
                slots.append(found[0])
                numbers.append(found[1])
            tile, place = np.divmod(picture.layout.features, per_tile)
            features.append(np.array(slots)[tile] * per_tile + place)
            contents.append(-1 - (np.array(numbers, np.int64)[tile] * per_tile + place))
        job.contents = job.request.input_ids.astype(np.int64)
        job.feature_ids = np.full(job.length, NO_TOKEN, np.int32)
        if features:
            places = job.request.input_ids == self._image_token_id
            job.feature_ids[places] = np.concatenate(features)
            job.contents[places] = np.concatenate(contents)
        return True
