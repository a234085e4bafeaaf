"""Which jobs are read next, into which rows, and what they share with other rows.

S side of a tile, P features of a tile, T tokens of a prompt.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Executor

import numpy as np

from llava_jax.errors import LlavaError
from llava_jax.inference.answer import Answer
from llava_jax.inference.decoding import NO_TOKEN
from llava_jax.inference.jobs import END, NOTHING_NOW, Job, Picture, Source

NOTHING = np.iinfo(np.int64).min  # in no prompt's contents

Tiles = list[tuple[bytes, np.ndarray]]  # of a picture: each tile's digest and pixels


class Queue:
    """Jobs that wait for a row, whose pictures are read meanwhile by the threads of a pool.

    Attributes:
      ended: no job will follow those that wait.
    """

    def __init__(self, source: Source, pool: Executor):
        self.ended = False
        self._source, self._pool = source, pool
        self._jobs: list[Job] = []

    def __len__(self) -> int:
        return len(self._jobs)

    def __iter__(self) -> Iterator[Job]:
        return iter(self._jobs)

    def fill(self, count: int) -> int:
        """Takes jobs until `count` wait or the source is silent -> how many were taken."""
        taken = 0
        while not self.ended and len(self._jobs) < count:
            job = self._source.poll()
            if job is NOTHING_NOW:
                break
            if job is END:
                self.ended = True
                break
            job.answer.prompt_tokens = job.length
            job.tiles = [self._pool.submit(read_tiles, p) for p in job.request.pictures]
            self._jobs.append(job)
            taken += 1
        return taken

    def remove_ended(self) -> list[Answer]:
        """Removes jobs that were cancelled or have an unreadable picture -> their answers."""
        ended = []
        for job in self._jobs:
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
        for job in self._jobs:
            for future in job.tiles:
                future.cancel()

    def ready(self, count: int) -> list[Job]:
        """The next jobs, at most `count`, whose pictures are there.

        A live source's are those that are loaded by now. Other jobs keep their order: the first
        ones are waited for, so that what runs together does not depend on the speed of a disk.
        """
        if self._source.live:
            return [job for job in self._jobs if job.loaded][:count]
        for job in self._jobs[:count]:
            for future in job.tiles:
                future.exception()
        return self._jobs[:count]

    def remove(self, jobs: Sequence[Job]) -> None:
        """Takes jobs out; the pictures of those that are not answered need not be read."""
        gone = set(jobs)
        self._jobs = [job for job in self._jobs if job not in gone]

    def put_back(self, jobs: Sequence[Job]) -> None:
        """Jobs that were ready, but are read later."""
        self._jobs[:0] = jobs


def read_tiles(picture: Picture) -> Tiles:
    """The tiles of a picture; runs in a thread of the pool."""
    tiles = picture.load()
    head = f"{tiles.shape[1:]}{tiles.dtype}".encode()
    return [(hashlib.sha256(head + tile.tobytes()).digest(), tile) for tile in tiles]


def _error_of(job: Job) -> LlavaError | None:
    """Why a picture of a job cannot be read; other exceptions are bugs and are raised."""
    for future in job.tiles:
        error = future.exception()
        if isinstance(error, LlavaError):
            return error
        if error:
            raise error
    return None


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
      tile_slots: of the feature store.
      image_token_id: the placeholder id.
      tokens_per_tile: P.
    """

    def __init__(self, tile_slots: int, image_token_id: int, tokens_per_tile: int):
        self._tiles = TileSlots(tile_slots)
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
            job.shared, job.sources = shared, np.full(job.length, job.row, np.int32)
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
