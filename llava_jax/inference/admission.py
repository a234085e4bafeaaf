"""Where jobs go: the row of each, its pages of the cache, and the slots of its tiles.

S side of a tile, P features of a tile, T tokens of a prompt.
"""

from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from llava_jax.inference.jobs import Job, Tiles, pages_of, picture_places
from llava_jax.inference.paging import Pages
from llava_jax.models.cache import PAGE
from llava_jax.models.llava import LlavaConfig
from llava_jax.models.taps import TEXT

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


@dataclass
class _Plan:
    """A wave while it is put together.

    Attributes:
      rows: that are free.
      pinned: slots of tiles that the wave needs.
      tiles: those to be encoded, by slot.
    """

    rows: list[int]
    pinned: set[int] = field(default_factory=set)
    tiles: dict[int, np.ndarray] = field(default_factory=dict)


class Admission:
    """Gives jobs their rows, their pages of the cache and their slots of the feature store.

    Args:
      config: of the model.
      tile_slots: slots of the store.

    Attributes:
      pages: of the cache.
    """

    def __init__(self, config: LlavaConfig, tile_slots: int):
        self._config = config
        self._tiles = TileSlots(tile_slots)
        self._pictures = PictureNumbers()
        self.pages = Pages(0)

    def resize(self, pages: int) -> None:
        """The cache is a new one, of so many pages that hold nothing."""
        self.pages = Pages(pages)

    def grow(self, job: Job, tokens: int) -> bool:
        """Pages for so many tokens more than the job and its twin have; False if there are none."""
        for reading in job.readings:
            wanted = pages_of(min(reading.filled + tokens, reading.most)) - len(reading.pages)
            more = self.pages.take(max(wanted, 0))
            if more is None:
                return False
            reading.pages += more
        return True

    def freed(self, job: Job) -> None:
        """The pages of a job and its twin can be given away; until then they hold its tokens."""
        for reading in job.readings:
            # The last token was chosen, but never read.
            answer = np.array(reading.produced[:-1], np.int64)
            contents = np.concatenate([reading.contents[: reading.length], answer])
            self.pages.know(contents, reading.pages)
            self._drop(reading)

    def put_back(self, job: Job) -> None:
        """A job of a wave and its twin are not read: their pages hold nothing."""
        for reading in job.readings:
            self._unread(reading)

    def _unread(self, reading: Job) -> None:
        self.pages.forget(reading.pages[reading.shared // PAGE :])
        self._drop(reading)

    def _drop(self, reading: Job) -> None:
        self.pages.drop(reading.pages)
        reading.pages = []

    def wave(
        self, jobs: Sequence[Job], rows: Iterable[int], tokens: int
    ) -> tuple[list[Job], dict[int, np.ndarray]]:
        """Gives a row of `rows` to each of the first jobs, as many as can be read now.

        A job with a twin gets two, or none. A prompt may share pages with a prompt earlier in the
        wave; it must not be read before that one.

        Args:
          tokens: that a call adds to a row; a job gets pages for those, too.

        Returns:
          The jobs, and the tiles that are to be encoded first, by slot. Those of a job that found
          no room in the end are among them: the next wave takes them as encoded.
        """
        plan, wave = _Plan(sorted(rows)), []
        for job in jobs:
            if not self._place(job, plan, tokens):
                break
            wave.append(job)
        return wave, plan.tiles

    def _place(self, job: Job, plan: _Plan, tokens: int) -> bool:
        """Gives rows, pages and slots to a job and its twin; False if there is no room for both."""
        if len(job.readings) > len(plan.rows):
            return False
        for placed, reading in enumerate(job.readings):
            reading.contents = self._contents(reading)
            shared = self.pages.find(reading.contents)
            self.pages.use(shared)
            more = pages_of(min(reading.filled + tokens, reading.most)) - len(shared)
            reading.pages, reading.shared = shared, len(shared) * PAGE
            new = self.pages.take(more)
            if new is None or not self._place_tiles(reading, reading.shared, plan):
                self.pages.drop(new or [])
                self._drop(reading)
                for other in job.readings[:placed]:
                    self._unread(other)
                return False
            reading.pages, reading.read = shared + new, reading.shared
            self.pages.know(reading.contents, reading.pages)
        for reading in job.readings:
            reading.row = plan.rows.pop(0)
        return True

    def place_alone(self, job: Job) -> dict[int, np.ndarray]:
        """Finds slots for the tiles of a job that takes no row -> those to be encoded, by slot."""
        plan = _Plan([])
        self._place_tiles(job, 0, plan)  # a single request has room: it was checked
        return plan.tiles

    def _contents(self, job: Job) -> np.ndarray:
        """int64[T], the prompt and the answer so far as `Pages` compares them."""
        contents = job.ids.astype(np.int64)
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

        Pictures among the first `shared` tokens, which pages hold, need none. False if the
        jobs of the wave before it need all slots.
        """
        per_tile, taps = self._config.tokens_per_tile, self._config.image.taps
        shape = (job.filled,) if taps == 1 else (job.filled, taps)
        job.feature_ids = np.full(shape, TEXT, np.int32)
        job.feature_weights = None if taps == 1 else np.zeros(shape, np.float32)
        if job.request.params.prompt_logprobs is not None and not job.produced:
            shared = 0  # these are of every token
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
