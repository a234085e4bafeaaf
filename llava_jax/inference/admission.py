"""Where jobs go: the row of the cache that each is read into, and the slots of their tiles.

S side of a tile, P features of a tile, T tokens of a prompt.
"""

from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np

from llava_jax.inference.jobs import Job, Tiles, picture_places
from llava_jax.models.llava import LlavaConfig
from llava_jax.models.taps import TEXT

NOTHING = np.iinfo(np.int64).min  # in no prompt's contents
KNOWN_PICTURES = 4096  # that have a number; prompts share no picture that was forgotten since
MOST_TOKENS = 1 << 32  # of a picture: far more than any has


class TileSlots:
    """Slots of the feature store by the content of tiles; the least recently used is replaced."""

    def __init__(self, count: int):
        self._free = list(range(count))
        self._held: OrderedDict[bytes, int] = OrderedDict()  # digest -> slot

    def find(self, digest: bytes) -> int | None:
        """The slot of a tile that is in the store, now the most recently used."""
        if digest not in self._held:
            return None
        self._held.move_to_end(digest)
        return self._held[digest]

    def add(self, digest: bytes, pinned: Collection[int]) -> int | None:
        """The slot for a new tile; None if every slot is one of `pinned`."""
        if not self._free:
            oldest = next((d for d, slot in self._held.items() if slot not in pinned), None)
            if oldest is None:
                return None
            self._free.append(self._held.pop(oldest))
        self._held[digest] = self._free.pop()
        return self._held[digest]


class PictureNumbers:
    """A number for each picture, by the digest of all that its tokens show; never given twice.

    The least recently used of more than `most` pictures is forgotten, and gets a new number when it
    comes again: what was read of it is not found any more, but nothing else is found in its place.
    """

    def __init__(self, most: int = KNOWN_PICTURES):
        self._numbers: OrderedDict[bytes, int] = OrderedDict()
        self._most, self._given = most, 0

    def __getitem__(self, digest: bytes) -> int:
        if digest not in self._numbers:
            self._given += 1
            self._numbers[digest] = self._given
            if len(self._numbers) > self._most:
                self._numbers.popitem(last=False)
        self._numbers.move_to_end(digest)
        return self._numbers[digest]


class RowSlots:
    """The contents of the cache's rows, and which row was used least recently.

    A prompt is known by its `contents`, int64[T]: the ids of its text tokens, and numbers below
    zero, one for each token of each picture. If two prompts begin with equal contents, they have
    equal keys and values there.
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


@dataclass
class _Plan:
    """A wave while it is put together.

    Attributes:
      free: rows that may be given away.
      placed: what is read into rows, by row.
      needed: rows whose present contents are to be copied from.
      pinned: slots of tiles that the wave needs.
      tiles: those to be encoded, by slot.
    """

    free: set[int]
    placed: dict[int, Job] = field(default_factory=dict)
    needed: set[int] = field(default_factory=set)
    pinned: set[int] = field(default_factory=set)
    tiles: dict[int, np.ndarray] = field(default_factory=dict)


class Admission:
    """Gives jobs their rows of the cache and their slots of the feature store.

    Args:
      config: of the model.
      tile_slots: slots of the store.
    """

    def __init__(self, config: LlavaConfig, tile_slots: int):
        self._config = config
        self._tiles = TileSlots(tile_slots)
        self._rows = RowSlots(0, 0)
        self._pictures = PictureNumbers()

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

        A job with a twin gets two, or none. A prompt may share its beginning with a row, or with a
        prompt earlier in the wave; it must not be read before that one.

        Returns:
          The jobs, and the tiles that are to be encoded first, by slot.
        """
        plan, wave = _Plan(set(free)), []
        for job in jobs:
            if not self._place(job, plan):
                break
            wave.append(job)
        return wave, plan.tiles

    def _place(self, job: Job, plan: _Plan) -> bool:
        """Gives rows and slots to a job and its twin; False if they have no room in this wave."""
        for waiting, reading in zip(range(len(job.readings))[::-1], job.readings, strict=True):
            reading.contents = self._contents(reading)
            planned = {row: other.contents for row, other in plan.placed.items()}
            donor, shared = self._rows.donor(reading.contents, planned)
            rows = plan.free - set(plan.placed) - plan.needed
            if len(rows) <= waiting or not self._place_tiles(reading, shared, plan):
                if reading is job.twin:
                    del plan.placed[job.row]
                return False
            # A donor keeps its contents, unless the last rows are needed: these, and the twin's.
            others = rows - {donor} if shared else rows
            reading.row = self._rows.oldest(others) if len(others) > waiting else donor
            # In its own row a prompt finds what it shares in place; otherwise it is copied there.
            reading.shared = reading.read = shared
            reading.sources = np.full(reading.length, reading.row, np.int32)
            if shared:
                plan.needed.add(donor)
                held = donor in plan.placed
                source = plan.placed[donor].sources if held else np.full(shared, donor)
                reading.sources[:shared] = source[:shared]
            plan.placed[reading.row] = reading
        return True

    def place_alone(self, job: Job) -> dict[int, np.ndarray]:
        """Finds slots for the tiles of a job that takes no row -> those to be encoded, by slot."""
        plan = _Plan(set())
        self._place_tiles(job, 0, plan)  # a single request has room: it was checked
        return plan.tiles

    def _contents(self, job: Job) -> np.ndarray:
        """int64[T], the prompt as `RowSlots` compares it."""
        contents = job.request.input_ids.astype(np.int64)
        for picture, future, places in self._pictures_of(job):
            number = self._pictures[future.result().digest]
            contents[places] = -1 - (number * MOST_TOKENS + np.arange(len(picture.layout)))
        return contents

    def _pictures_of(self, job: Job):
        """(picture, the future of its tiles, int[n] the places of its tokens) of a prompt."""
        places = picture_places(job.request, self._config)
        return zip(job.request.pictures, job.tiles, places, strict=True)

    def _place_tiles(self, job: Job, shared: int, plan: _Plan) -> bool:
        """Finds a slot for each tile of a job; the tiles to be encoded go into the plan.

        Pictures among the first `shared` tokens, which other rows hold, need none. False if the
        jobs of the wave before it need all slots.
        """
        per_tile, taps = self._config.tokens_per_tile, self._config.image.taps
        shape = (job.length,) if taps == 1 else (job.length, taps)
        job.feature_ids = np.full(shape, TEXT, np.int32)
        job.feature_weights = None if taps == 1 else np.zeros(shape, np.float32)
        if job.request.params.prompt_logprobs is not None:  # which are of every token
            shared = 0
        for picture, future, places in self._pictures_of(job):
            if not len(places) or places[-1] < shared:
                continue
            slots = self._slots(future.result(), plan)
            if slots is None:
                return False
            features = picture.layout.features
            tile, place = np.divmod(features, per_tile)
            shown = np.where(features < 0, features, slots[tile] * per_tile + place)
            job.feature_ids[places] = shown
            if taps > 1:
                job.feature_weights[places] = picture.layout.weights
        return True

    def _slots(self, picture: Tiles, plan: _Plan) -> np.ndarray | None:
        """The slot of each tile of a picture; None if there are too few."""
        slots = []
        for digest, tile in picture.tiles:
            slot = self._tiles.find(digest)
            if slot is None:
                slot = self._tiles.add(digest, plan.pinned)
                if slot is None:
                    return None
                plan.tiles[slot] = tile
            plan.pinned.add(slot)
            slots.append(slot)
        return np.array(slots)
