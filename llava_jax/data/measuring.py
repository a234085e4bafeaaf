"""What must be known of all records before the first batch: their faults and their lengths.

Every record is read, checked and rendered once, the first and last bytes of every image file are
read, every conversation is tokenized. This goes chunk by chunk, in several processes where there
are many; what cannot change between runs is kept, one file a chunk, in a cache folder.
"""

import dataclasses
import functools
import hashlib
import itertools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from llava_jax.data import sources
from llava_jax.data.buckets import is_url
from llava_jax.data.chunks import Census, Chunk
from llava_jax.data.kept import VERSION, Part, keep_part, read_part
from llava_jax.data.looking import Look, look_at
from llava_jax.data.media import ImageError
from llava_jax.data.parsing import Record
from llava_jax.data.rows import RowFormat
from llava_jax.errors import LlavaError, RecordError
from llava_jax.text.tokenization import SegmentTokenizer, token_row

_AT_ONCE = 256  # records in memory, with the pictures within them
_BATCH = 1024  # records tokenized at a time
_REMOTE_THREADS = 32  # they wait for a bucket most of the time
_LEAST = 6  # chunks that a process is worth starting for
_LIGHT = 100  # times less work is a chunk that was kept


class Measured(NamedTuple):
    """All that is known of N records before the first batch.

    lengths, full: int32 [N], tokens after and before cutting at max_length. tiles: int32 [N].
    refused: reason -> numbers of the records that cannot be used. bad_images: the fault of each
    record that is refused for a bad image. cut: how many lost their end at max_length.
    """

    lengths: np.ndarray
    full: np.ndarray
    tiles: np.ndarray
    refused: dict[str, list[int]]
    bad_images: list[str]
    cut: int


class Findings:
    """Where `measure` reports what it finds. This one raises the first fault, as training does."""

    def fault(self, index: int | None, error: LlavaError) -> None:
        """A fault of record number `index`, which is not used, or (None) of the data as a whole."""
        raise error

    def record(self, record: Record) -> None:
        """A record of the right form, whose images exist."""

    def tokens(self, index: int, length: int, tiles: int, reason: str | None) -> None:
        """The tokens of a record before it is cut, its tiles, and the reason if it is too long."""


class ImagePolicy(NamedTuple):
    """What happens to a record whose image fails.

    max_pixels: as in `load_image`. skip: refuse the record, up to `ceiling` records, instead of
    raising at the first.
    """

    max_pixels: int
    skip: bool
    ceiling: int


def measure(
    records,
    tokenizer: SegmentTokenizer | None,
    row_format: RowFormat,
    policy: ImagePolicy,
    cache_dir: str | os.PathLike | None = None,
    threads: int = 4,
    progress: bool = True,
    findings: Findings | None = None,
    host: tuple[int, int] = (0, 1),
    processes: int | None = None,
) -> Measured:
    """Checks and measures all `records`, whose `census` is known then.

    Records that are sound but too long (nothing supervised left, an image cut) or have more than
    `row_format.tiles` tiles are refused with the reason; so are those with bad images, if
    `policy.skip`.

    Args:
      tokenizer: without one all lengths are 0.
      findings: what to do about a fault, by default to raise it. Other findings are reported from
        this process, in the order of the records, and nothing is kept.
      host: (index, count) of hosts that measure the same records at the same time. Each begins at
        another place, and finds what the others have kept, where they share `cache_dir`.
      processes: by default as many as there are cores and work is worth.
    """
    chunks = records.chunks()
    first = len(chunks) * host[0] // host[1]
    chunks = chunks[first:] + chunks[:first]
    gauge = Gauge(records, tokenizer, row_format, policy, cache_dir, threads)
    if findings is None:
        findings, parts = Findings(), _parts(gauge, chunks, processes)
    else:
        parts = (gauge.measured(chunk, findings) for chunk in chunks)
    lengths, full, tiles = (np.zeros(len(records), np.int32) for _ in range(3))
    refused, faults, cut, census = {}, {}, 0, Census.none()
    silent = not progress or host[0] > 0
    with tqdm(desc="measuring", total=len(records), unit=" records", disable=silent) as bar:
        for chunk, part in zip(chunks, parts, strict=True):
            here = slice(chunk.start, chunk.stop)
            lengths[here], full[here], tiles[here] = part.lengths, part.full, part.tiles
            for reason, places in part.refused.items():
                refused.setdefault(reason, []).extend(chunk.start + place for place in places)
            faults |= {chunk.start + place: error for place, error in part.faults.items()}
            cut += part.cut
            census.merge(part.census, chunk.source)
            bar.update(len(chunk.numbers))
    records.census = census
    of_reason = ((reason, sorted(indices)) for reason, indices in refused.items())
    refused = dict(sorted(of_reason, key=lambda entry: entry[1][0]))
    messages = [str(faults[index]) for index in sorted(faults)]
    if len(faults) > policy.ceiling:
        error = LlavaError(
            f"{len(faults)} records have bad images, more than bad_image_ceiling={policy.ceiling}; "
            f"the first: {messages[0]}"
        )
        findings.fault(None, error)
    refused = _add(refused, "bad image", sorted(faults))
    crowded = np.flatnonzero(tiles > row_format.tiles).tolist()
    refused = _add(refused, row_format.crowded, crowded)
    return Measured(lengths, full, tiles, refused, messages, cut)


def _add(refused: dict[str, list[int]], reason: str, indices: list[int]):
    """`refused` with those of `indices` that no earlier reason has."""
    taken = {index for known in refused.values() for index in known}
    rest = [index for index in indices if index not in taken]
    return {**refused, reason: rest} if rest else dict(refused)


@dataclasses.dataclass
class Gauge:
    """Chunk -> Part, kept or measured; picklable. Arguments as of `measure`."""

    records: object
    tokenizer: SegmentTokenizer | None
    row_format: RowFormat
    policy: ImagePolicy
    cache_dir: str | os.PathLike | None
    threads: int

    def __call__(self, chunk: Chunk) -> Part:
        """The part of a chunk, for training. Raises the first fault."""
        path = self.place(chunk)
        kept = None if path is None else read_part(path)
        if kept is None or not self._is_good(chunk, kept):
            kept = self.measured(chunk, Findings(), kept)
            if path is not None:
                keep_part(path, kept)
        return kept._replace(places=[])

    def place(self, chunk: Chunk) -> Path | None:
        """The file in which the part of a chunk is kept."""
        if self.cache_dir is None:
            return None
        key = hashlib.sha256(f"{self._options}{chunk.content}".encode()).hexdigest()
        return Path(self.cache_dir) / f"measured-{key[:32]}.npz"

    @functools.cached_property
    def _options(self) -> str:
        """A hash of all that decides lengths besides the records."""
        key, f = hashlib.sha256(), self.row_format
        ids = self.tokenizer and self.tokenizer.fingerprint(f.image_key())
        for part in (VERSION, ids, f.template, f.max_length, f.turns, f.boxes):
            key.update(f"{part}\0".encode())
        return key.hexdigest()

    def _seen(self, chunk: Chunk, files) -> str:
        """`Part.seen` of a chunk whose files have these states."""
        image = self.row_format.image
        asked = f"{chunk.within} {self.policy.max_pixels} {image.size} {image.mode}"
        return hashlib.sha256(asked.encode() + b"".join(files)).hexdigest()

    def _is_good(self, chunk: Chunk, part: Part) -> bool:
        """Whether the pictures of a part are those that were found good."""
        files = (sources.state(sources.at_place(place), place) for place in part.places)
        try:
            return bool(part.seen) and part.seen == self._seen(chunk, files)
        except ImageError:  # a file is gone
            return False

    def measured(self, chunk: Chunk, findings: Findings, before: Part | None = None) -> Part:
        """Looks at the records of a chunk, once each.

        before: what was kept of them, of pictures that may have changed.
        """
        if before is not None and before.sized:
            before = None
        count, path = len(chunk.numbers), self.records.path
        files, places, faults, waiting, census = [], [], {}, [], Census.none()
        sized = self.row_format.image.by_size
        lengths, full, tiles = (np.zeros(count, np.int32) for _ in range(3))
        part = Part(lengths, full, tiles, {}, 0, faults, census, sized, places, "")
        for index, look in zip(chunk.numbers, self._looks(chunk.numbers), strict=True):
            place = index - chunk.start
            for error in look.errors:
                error = RecordError(error.kind, f"{path}: {error}")
                if look.is_image and self.policy.skip:
                    faults.setdefault(place, error)
                else:
                    findings.fault(index, error)
            files.append(look.files)
            places += look.places
            tiles[place] = sum(tiles for tiles, _ in look.layouts)
            if look.record is not None:
                findings.record(look.record)
                census.add(look.record)
                sized = sized or bool(look.record.boxes)
            if look.unwritten is not None:
                findings.fault(index, look.unwritten)
            if look.texts is not None and before is None:
                waiting.append((place, look.texts, [tokens for _, tokens in look.layouts]))
            if len(waiting) == _BATCH:
                part = self._with_lengths(part, waiting, chunk.start, findings)
                waiting = []
        part = self._with_lengths(part, waiting, chunk.start, findings)
        if before is not None:
            known = ("lengths", "full", "refused", "cut")
            part = part._replace(**{name: getattr(before, name) for name in known})
        return part._replace(sized=sized, seen="" if faults else self._seen(chunk, files))

    def _looks(self, numbers: Sequence[int]) -> Iterator[Look]:
        look = functools.partial(
            look_at, self.records, self.row_format, self.tokenizer, self.policy.max_pixels
        )
        is_remote = any(map(is_url, self.records.image_roots))
        with ThreadPool(max(self.threads, _REMOTE_THREADS * is_remote)) as pool:
            for start in range(0, len(numbers), _AT_ONCE):
                yield from pool.map(look, numbers[start : start + _AT_ONCE], chunksize=16)

    def _with_lengths(self, part: Part, waiting, start: int, findings: Findings) -> Part:
        """The part with the lengths of records: (place, texts, tokens of each image)."""
        if not waiting or self.tokenizer is None:
            return part
        f, tokenizer = self.row_format, self.tokenizer
        texts, images = [entry[1] for entry in waiting], [entry[2] for entry in waiting]
        if f.turns == "conversation":
            lengths, rows = tokenizer.measure([one[0] for one in texts], images, f.max_length)
        else:
            rows = dict(enumerate(map(token_row, itertools.repeat(tokenizer), texts, images)))
            lengths = [len(row) for row in rows.values()]
        for number, ((place, *_), length) in enumerate(zip(waiting, lengths, strict=True)):
            full, reason = int(length), None
            if full > f.max_length:
                row, reason = f.cut(rows[number])
                length = 0 if row is None else len(row)
                part = part._replace(cut=part.cut + (row is not None))
                if row is None:
                    reason = f"{reason} at max_length={f.max_length}"
                    part.refused.setdefault(reason, []).append(place)
            findings.tokens(start + place, full, int(part.tiles[place]), reason)
            part.lengths[place], part.full[place] = length, full
        return part


def _parts(gauge: Gauge, chunks: list[Chunk], processes: int | None) -> Iterator[Part]:
    """The parts of all chunks in their order. Raises the first fault."""
    paths = list(map(gauge.place, chunks))
    fresh = sum(path is None or not path.exists() for path in paths)
    if fresh and gauge.cache_dir is not None and any(Path(gauge.cache_dir).glob("lengths-*.npz")):
        text = f"{gauge.cache_dir} has lengths of an earlier version: they are measured anew"
        tqdm.write(text, file=sys.stderr)
    if processes is None:
        processes = processes_for(fresh + len(chunks) // _LIGHT)
    if processes < 2 or not _others_can_start():
        yield from map(gauge, chunks)
        return
    # What a mixture repeats is kept when it comes again.
    first_of = {path: number for number, path in reversed([*enumerate(paths)]) if path is not None}
    is_first = [first_of.get(path, number) == number for number, path in enumerate(paths)]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, spawn, _begin, (gauge,)) as pool:
        try:
            found = pool.map(_work, itertools.compress(chunks, is_first))
            for chunk, first in zip(chunks, is_first, strict=True):
                yield next(found) if first else gauge(chunk)
        except BrokenProcessPool:
            raise LlavaError(
                "a process that measured records was ended, perhaps for want of memory: start "
                "again, what was measured is kept; a script of your own must begin within "
                'if __name__ == "__main__"'
            ) from None


def processes_for(chunks: int) -> int:
    """How many processes so many chunks are worth."""
    return min(len(os.sched_getaffinity(0)), chunks // _LEAST)


def _others_can_start() -> bool:
    """Whether a process can be spawned: a program on standard input names a file that is not there.

    The new process would end at once, and this one wait for ever to hand it its work.
    """
    program = getattr(sys.modules["__main__"], "__file__", None)
    return program is None or os.path.exists(program)


def _begin(gauge: Gauge) -> None:
    """What a process of `_parts` does first."""
    global _gauge
    _gauge = gauge
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the run hears it, too
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_follow, daemon=True).start()


def _follow() -> None:
    """Ends this process with the run, however that ends."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _work(chunk: Chunk) -> Part:
    return _gauge(chunk)
