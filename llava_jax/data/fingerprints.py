"""A small stand-in for every picture of a data set, by which copies of it are recognised.

N pictures, S = 16 the side of a thumbnail.
"""

import hashlib
import tempfile
import threading
from array import array
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from llava_jax.data.buckets import StoredObject
from llava_jax.data.media import MAX_PIXELS, ImageError, encoded, load_image
from llava_jax.data.video import Video
from llava_jax.errors import LlavaError, RecordError

SIDE = 16
_AT_ONCE = 1024  # records in the queue of the threads that decode
PIXELS = SIDE * SIDE * 3  # values of a thumbnail
_SOUND = None, None  # of a picture without error and number
_GREY = 32  # side of the picture that the perceptual hash is of
# The eight lowest frequencies of a cosine transform, [8, _GREY].
_COSINES = np.cos(np.pi * np.arange(8)[:, None] * (2 * np.arange(_GREY) + 1) / (2 * _GREY))


@dataclass(frozen=True)
class Fingerprints:
    """What is kept of the pictures of a data set, in the order in which records use them first.

    A file that several records name is one picture. One inside a data set is one for each record
    of that set, however often a mixture repeats the record.

    Attributes:
      hashes: uint64 [N, 3], of the encoded bytes, of the pixels, and the perceptual one.
      records: int64 [uses], the numbers of the records that use a picture, ascending.
      places: int64 [uses], the number of the picture in its record.
      rows: int64 [uses], which picture.
    """

    hashes: np.ndarray
    records: np.ndarray
    places: np.ndarray
    rows: np.ndarray
    _thumbnails: np.ndarray  # of those that were added
    _order: np.ndarray

    def __len__(self) -> int:
        return len(self.hashes)

    def thumbnails(self, rows: np.ndarray) -> np.ndarray:
        """int16 [len(rows), PIXELS]."""
        return self._thumbnails[self._order[rows]].astype(np.int16)

    def users(self, rows: np.ndarray) -> list[int]:
        """The numbers of the records that use some of these pictures."""
        return np.unique(self.records[np.isin(self.rows, rows)]).tolist()

    def first_use(self, row: int) -> tuple[int, int]:
        """(record, place in it) of a picture."""
        use = int(np.argmax(self.rows == row))
        return int(self.records[use]), int(self.places[use])


class Collector:
    """Takes pictures from several threads.

    In memory are 24 bytes a picture and 24 a use of it; the thumbnails, 768 bytes each, are in a
    temporary file.
    """

    def __init__(self):
        self._hashes, self._uses = array("Q"), array("q")
        self._file, self._lock = tempfile.TemporaryFile(), threading.Lock()

    def add(self, data: bytes, image: Image.Image) -> int:
        """The number of a picture, given its encoded bytes and its upright RGB pixels."""
        pixels = digest(image.tobytes(), b"%d x %d" % image.size)
        grey = image.convert("L").resize((_GREY, _GREY), Image.Resampling.HAMMING)
        thumbnail = image.resize((SIDE, SIDE), Image.Resampling.HAMMING).tobytes()
        with self._lock:
            self._hashes.extend((digest(data), pixels, perceptual_hash(np.asarray(grey))))
            self._file.write(thumbnail)
            return len(self._hashes) // 3 - 1

    def use(self, record: int, place: int, number: int) -> None:
        """Notes that a record uses a picture; records come in their order."""
        self._uses.extend((record, place, number))

    def finish(self) -> Fingerprints:
        """Those pictures that a record uses."""
        hashes = np.array(self._hashes, np.uint64).reshape(-1, 3)
        records, places, numbers = np.array(self._uses, np.int64).reshape(-1, 3).T
        used, first, of_use = np.unique(numbers, return_index=True, return_inverse=True)
        by_use = np.argsort(first)
        row = np.empty_like(by_use)
        row[by_use] = np.arange(len(by_use))
        order, thumbnails = used[by_use], np.zeros((0, PIXELS), np.uint8)
        self._file.flush()
        if len(hashes):
            thumbnails = np.memmap(self._file, np.uint8, "r", shape=(len(hashes), PIXELS))
        return Fingerprints(hashes[order], records, places, row[of_use], thumbnails, order)


def digest(data: bytes, key: bytes = b"") -> int:
    """64 bits of a hash."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, key=key).digest(), "little")


def perceptual_hash(grey: np.ndarray) -> int:
    """pHash: which of the lowest 63 frequencies of a grey picture [H, H] are above their median.

    Little changes of all pixels, by compression or another size, change few of the bits.
    """
    frequencies = (_COSINES @ grey.astype(np.float64) @ _COSINES.T).ravel()[1:]
    bits = frequencies > np.median(frequencies)
    return int.from_bytes(np.packbits(bits, bitorder="little").tobytes(), "little")


class Decoded(NamedTuple):
    """What came of the pictures of one record.

    error: of the first that cannot be decoded. pictures: (place in the record, number in the
    collector) of those that can.
    """

    error: RecordError | None
    pictures: tuple[tuple[int, int], ...]


class Decoder:
    """Number of a record -> Decoded. A picture is decoded once.

    Args:
      look: checks a video, given it and its name; None leaves videos out.
      collects: whether pictures are fingerprinted, and not only decoded.
    """

    def __init__(self, records, max_pixels: int, look=None, collects: bool = True):
        self.collector, self._collects = Collector(), collects
        self._records, self._max_pixels, self._look = records, max_pixels, look
        # By the digest of where a picture is: there may be as many as records.
        self._known: dict[int, tuple[ImageError | None, int | None]] = {}
        self._lock = threading.Lock()
        self._in_records = 0  # pictures that are no files

    def __call__(self, index: int) -> Decoded:
        try:
            record = self._records[index]
        except RecordError as error:
            return Decoded(error, ())
        found, pictures = None, []
        sources = zip(record.images, record.image_names, strict=True)
        for place, (source, name) in enumerate(sources):
            path = source.source if isinstance(source, Video) else source
            # A mixture may hold a record several times, with the pictures inside it.
            inside = f"{record.origin}, picture {place}" if record.origin else None
            path = path.url if isinstance(path, StoredObject) else path
            where = path if isinstance(path, str) else inside
            key = None if where is None else digest(where.encode(errors="surrogatepass"))
            if key is not None and key in self._known:
                error, number = self._known[key]
            else:
                error, number = self._decode(source, key, name)
            if number is not None:
                pictures.append((place, number))
            if error is not None and found is None:
                found = RecordError(error.kind, f"{record.name}: {error}")
        return Decoded(found, tuple(pictures))

    @property
    def total(self) -> int:
        """Pictures and videos that were decoded."""
        return len(self._known) + self._in_records

    def _decode(self, source, key: int | None, name: str) -> tuple[ImageError | None, int | None]:
        error = number = None
        try:
            if not isinstance(source, Video):
                data = _bytes(source, name)
                image = load_image(data or source, name, self._max_pixels)
                if self._collects:
                    number = self.collector.add(data or image.tobytes(), image)
            elif self._look is not None:
                self._look(source, name)
        except ImageError as raised:
            error = raised
        found = _SOUND if error is None and number is None else (error, number)
        with self._lock:
            if key is not None:
                # Two threads may have decoded it: the first one's number is used.
                return self._known.setdefault(key, found)
            self._in_records += 1
        return found


def _bytes(source, name: str) -> bytes | None:
    """The encoded bytes of a picture; None where `load_image` knows better what is wrong."""
    if not isinstance(source, str):
        return encoded(source, name)
    try:
        return Path(source).read_bytes()
    except (OSError, ValueError):
        return None


def decode_all(decoder: Decoder, indices, threads: int, title: str, progress: bool):
    """Yields (index, error or None) of these records and collects their fingerprints."""
    # Threads suffice: Pillow lets go of the interpreter while it decodes.
    bar = tqdm(desc=title, total=len(indices), unit=" records", disable=not progress)
    with ThreadPool(threads) as pool, bar:
        for start in range(0, len(indices), _AT_ONCE):
            some = [int(index) for index in indices[start : start + _AT_ONCE]]
            for index, (error, pictures) in zip(some, pool.map(decoder, some, 8), strict=True):
                for place, number in pictures:
                    decoder.collector.use(index, place, number)
                yield index, error
            bar.update(len(some))


class PictureSet(NamedTuple):
    """The pictures of a data set or a benchmark.

    records: a sequence whose items have `images`, `image_names`, `name` and `origin`; `path` names
    it.
    unreadable: messages about pictures or records that could not be read.
    """

    records: object
    fingerprints: Fingerprints
    unreadable: list[str]


def picture_set(
    records, max_pixels: int = MAX_PIXELS, threads: int = 4, progress: bool = True
) -> PictureSet:
    """Fingerprints all pictures of `records`, which are not checked otherwise; no videos.

    Raises:
      LlavaError: none of them can be read.
    """
    decoder = Decoder(records, max_pixels)
    found = decode_all(decoder, range(len(records)), threads, "reading pictures", progress)
    unreadable = [str(error) for _, error in found if error is not None]
    fingerprints = decoder.collector.finish()
    if not len(fingerprints):
        reason = f"; the first that cannot be read: {unreadable[0]}" if unreadable else ""
        raise LlavaError(f"{records.path} has no picture to compare with{reason}")
    return PictureSet(records, fingerprints, unreadable)
