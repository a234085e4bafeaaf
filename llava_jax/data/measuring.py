"""What must be known of all records before the first batch: their faults and their lengths.

Every record is checked and rendered, the first and last bytes of every image file are read, every
conversation is tokenized. What cannot change between runs is kept in a cache folder.
"""

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from llava_jax.data import sources
from llava_jax.data.attachments import NO_FILE
from llava_jax.data.buckets import Unreachable, is_url
from llava_jax.data.media import ImageError
from llava_jax.data.parsing import Record, check_record
from llava_jax.data.rows import RowFormat, is_several, nominal, render_record
from llava_jax.errors import LlavaError, RecordError
from llava_jax.files import whole_file
from llava_jax.text.templates import Segment
from llava_jax.text.tokenization import SegmentTokenizer, token_row

_CHUNK = 1024  # records tokenized at a time
_REMOTE_THREADS = 32  # they wait for a bucket most of the time
_CACHE_VERSION = 4  # raise it when the meaning of a cached value changes
_NOT_READ = (*NO_FILE, "image outside the root", "video outside the root")  # kinds of fault


class Measured(NamedTuple):
    """All that is known of N records before the first batch.

    lengths, full: int64 [N], tokens after and before cutting at max_length. tiles: int64 [N].
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
) -> Measured:
    """Checks and measures all `records`.

    Records that are sound but too long (nothing supervised left, an image cut) or have more than
    `row_format.tiles` tiles are refused with the reason; so are those with bad images, if
    `policy.skip`.

    Args:
      tokenizer: without one all lengths are 0.
      findings: what to do about a fault, by default to raise it.
    """
    findings = findings or Findings()
    cache = _Cache(cache_dir, records, tokenizer, row_format)
    demands = f"{policy.max_pixels} {row_format.image.size} {row_format.image.mode}"
    look = functools.partial(_look_at_all, records, row_format, policy, findings, threads, progress)
    faults: dict[int, RecordError] = {}
    # Nothing can change in a data set that holds its images and was found good before.
    within = None if records.within is None else f"within the data set {records.within}".rstrip()
    if cache.lengths is None or within is None or cache.images_seen != f"{within} {demands}":
        looks, faults, files = look(inspect=cache.lengths is None)
        if within is None:
            seen = f"{files} {demands}"
        elif files == hashlib.sha256().hexdigest():
            seen = f"{within} {demands}"
        else:  # some are within, some have a file of their own
            seen = f"{files} {records.within} {demands}"
        changed = cache.images_seen != seen
        if cache.lengths is not None and changed:
            looks, faults, _ = look(inspect=True)
        by_size = row_format.image.by_size or records.holds_boxes
        if cache.lengths is None or changed and by_size:
            _tokenize(cache, records, tokenizer, row_format, looks, progress, findings)
        if changed or faults:
            cache.images_seen = "" if faults else seen
            cache.write()
    messages = [str(faults[index]) for index in sorted(faults)]
    if len(faults) > policy.ceiling:
        error = LlavaError(
            f"{len(faults)} records have bad images, more than bad_image_ceiling={policy.ceiling}; "
            f"the first: {messages[0]}"
        )
        findings.fault(None, error)
    refused = _add(cache.refused, "bad image", sorted(faults))
    crowded = np.flatnonzero(cache.tiles > row_format.tiles).tolist()
    refused = _add(refused, row_format.crowded, crowded)
    return Measured(cache.lengths, cache.full, cache.tiles, refused, messages, cache.cut)


def _add(refused: dict[str, list[int]], reason: str, indices: list[int]):
    """`refused` with those of `indices` that no earlier reason has."""
    taken = {index for known in refused.values() for index in known}
    rest = [index for index in indices if index not in taken]
    return {**refused, reason: rest} if rest else dict(refused)


class _Look(NamedTuple):
    """What was seen of one record.

    record: None if it has not the right form. errors: its faults. is_image: whether they are of
    its images or videos. files: path, size and time of modification of their files. layouts:
    (tiles, tokens) of each image, nominal for one that is faulty or was not inspected. seen: what
    is known of each.
    """

    record: Record | None
    errors: list[RecordError]
    is_image: bool
    files: bytes
    layouts: list[tuple[int, int]]
    seen: list[sources.Seen]


def _look_at_all(
    records, row_format, policy, findings: Findings, threads: int, progress: bool, inspect: bool
) -> tuple[list[_Look], dict[int, RecordError], str]:
    """The looks at all records, the errors of those left out for their images, and a digest.

    The digest is of the state of the image files. Other faults are reported as they are met.
    """
    looks, faults, state = [], {}, hashlib.sha256()
    look_at = functools.partial(_look, records, row_format, policy, inspect)
    if any(map(is_url, records.image_roots)):
        threads = max(threads, _REMOTE_THREADS)
    with ThreadPool(threads) as pool:
        found = pool.imap(look_at, range(len(records)), chunksize=16)
        title = "checking images" if inspect else "checking records"
        bar = tqdm(found, title, len(records), unit=" records", disable=not progress)
        for index, look in enumerate(bar):
            for error in look.errors:
                error = RecordError(error.kind, f"{records.path}: {error}")
                if look.is_image and policy.skip:
                    faults.setdefault(index, error)
                else:
                    findings.fault(index, error)
            state.update(look.files)
            if look.record is not None:
                findings.record(look.record)
            looks.append(look._replace(record=None, files=b""))  # images within it may be large
    return looks, faults, state.hexdigest()


def _look(records, row_format, policy: ImagePolicy, inspect: bool, index: int) -> _Look:
    """Checks a record, and with `inspect` its images."""
    record, errors, is_image, files, seen = None, [], True, b"", []
    try:
        record = records[index]
        seen = [nominal(record, number, row_format) for number in range(len(record.images))]
        check_record(record, records.image_root)
        files = b"".join(map(sources.state, record.images, record.image_names))
    except RecordError as error:
        errors, is_image = [error], error.kind in NO_FILE
        inspect = inspect and record is not None and error.kind not in _NOT_READ
    images = zip(record.images, record.image_names, strict=True) if inspect else ()
    for i, (source, name) in enumerate(images):
        try:
            seen[i] = sources.look_at(
                source, row_format.image, name, policy.max_pixels, is_several(record)
            )
        except Unreachable:
            raise
        except ImageError as error:
            errors.append(RecordError(error.kind, f"{record.name}: {error}"))
        except LlavaError as error:  # the model takes no videos, or they cannot be read here
            errors, is_image = [RecordError("video", f"{record.name}: {error}")], False
            break
    layouts = []
    if is_image:
        try:
            found = row_format.layouts([one.source for one in seen])
            layouts = [(layout.tiles, len(layout)) for layout in found]
        except LlavaError as error:  # a missing video, of a model that takes none
            errors, is_image = [RecordError("video", f"{record.name}: {error}")], False
    return _Look(record if is_image else None, errors, is_image, files, layouts, seen)


def _tokenize(
    cache, records, tokenizer, row_format, looks, progress: bool, findings: Findings
) -> None:
    """Tiles of all records and lengths of those that can be used, into the cache."""
    cache.lengths, cache.full = (np.zeros(len(records), np.int64) for _ in range(2))
    cache.refused, cache.cut = {}, 0
    cache.tiles = np.array([sum(tiles for tiles, _ in look.layouts) for look in looks], np.int64)
    bar = tqdm(looks, "measuring", unit=" records", disable=not progress)
    for chunk in _chunks(_rendered(records, row_format, tokenizer, bar, findings)):
        lengths, rows = (), {}  # rows: at least of those that are cut
        if tokenizer and row_format.turns == "conversation":
            texts, images = [entry[1][0] for entry in chunk], [entry[2] for entry in chunk]
            lengths, rows = tokenizer.measure(texts, images, row_format.max_length)
        elif tokenizer:
            rows = {i: token_row(tokenizer, *texts) for i, (_, *texts) in enumerate(chunk)}
            lengths = [len(row) for row in rows.values()]
        measured = zip(chunk, lengths, strict=tokenizer is not None)
        for number, ((index, *_), length) in enumerate(measured):
            full, reason = int(length), None
            if full > row_format.max_length:
                row, reason = row_format.cut(rows[number])
                length = 0 if row is None else len(row)
                cache.cut += row is not None
                if row is None:
                    reason = f"{reason} at max_length={row_format.max_length}"
                    cache.refused.setdefault(reason, []).append(index)
            findings.tokens(index, full, int(cache.tiles[index]), reason)
            cache.lengths[index], cache.full[index] = length, full


def _rendered(
    records, row_format, tokenizer, looks, findings: Findings
) -> Iterator[tuple[int, list[tuple[Segment, ...]], list[int]]]:
    """(number, texts, tokens of each image) of the records that can be used."""
    for index, look in enumerate(looks):
        if look.errors and not look.is_image:
            continue
        try:
            texts = render_record(row_format, records, records[index], tokenizer, look.seen)
        except RecordError as error:
            findings.fault(index, error)
            continue
        yield index, texts, [tokens for _, tokens in look.layouts]


def _chunks(items: Iterable) -> Iterator[list]:
    chunk = []
    for item in items:
        chunk.append(item)
        if len(chunk) == _CHUNK:
            yield chunk
            chunk = []
    yield chunk


class _Cache:
    """Lengths of one combination of data, tokenizer, template and max_length, in a file.

    `images_seen`: the image files, and what was asked of them, when all were last found good.
    """

    def __init__(self, folder, records, tokenizer, row_format):
        self.lengths = self.full = self.tiles = None
        self.refused: dict[str, list[int]] = {}
        self.cut = 0
        self.images_seen = ""
        self._path = None
        if folder is None:
            return
        key = hashlib.sha256()
        for part in (
            _CACHE_VERSION, records.fingerprint(),
            tokenizer.fingerprint(row_format.image_key()), row_format.template,
            row_format.max_length, row_format.turns,
            *([row_format.boxes] if records.holds_boxes else []),
        ):  # fmt: skip
            key.update(f"{part}\0".encode())
        self._path = Path(folder) / f"lengths-{key.hexdigest()[:32]}.npz"
        try:
            with np.load(self._path) as data:
                self.refused = json.loads(str(data["refused"]))
                self.images_seen = str(data["images_seen"])
                self.cut = int(data["cut"])
                lengths, self.tiles = data["lengths"], data["image_counts"]
                self.full = data["full"] if "full" in data else lengths  # older caches lack it
                self.lengths = lengths
        except Exception:  # absent or broken: measure anew
            pass

    def write(self) -> None:
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(self._path) as file:
            np.savez(
                file,
                lengths=self.lengths,
                full=self.full,
                image_counts=self.tiles,
                refused=json.dumps(self.refused),
                images_seen=self.images_seen,
                cut=self.cut,
            )
