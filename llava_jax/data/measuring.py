"""What must be known of all records before the first batch: their faults and their lengths.

Every record is checked and rendered, every image file's first and last bytes are looked at, every
conversation is tokenized. What cannot change between runs is kept in a cache folder.
"""

import hashlib
import json
import os
from collections.abc import Callable
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from llava_jax.data.media import ImageError, check_shape, inspect_image
from llava_jax.data.records import Record, checked_record
from llava_jax.data.rows import RowFormat
from llava_jax.errors import LlavaError, RecordError
from llava_jax.files import whole_file
from llava_jax.text.templates import Segment, Template
from llava_jax.text.tokenization import SegmentTokenizer, truncate
from llava_jax.text.turns import render_turns, token_row

_CHUNK = 1024  # records tokenized at a time
_CACHE_VERSION = 4  # raise it when the meaning of a cached value changes


class Measured(NamedTuple):
    """What `measure` learnt of N records.

    lengths: int64 [N], tokens after cutting at max_length. image_counts: int64 [N]. refused:
    reason -> numbers of the records that cannot be used. bad_images: what is wrong with each
    record that is refused for a bad image. cut: how many lost their end at max_length.
    """

    lengths: np.ndarray
    image_counts: np.ndarray
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

    def tokens(self, index: int, length: int, reason: str | None) -> None:
        """The length of a record before it is cut; the reason if it is too long to be of use."""


class ImagePolicy(NamedTuple):
    """What happens to a record whose image fails.

    max_pixels: as in `load_image`. skip: refuse the record, up to `ceiling` records, instead of
    raising at the first. look: replaces `inspect_image`.
    """

    max_pixels: int
    skip: bool
    ceiling: int
    look: Callable | None = None


def render_record(
    template: Template, records, record: Record, turns: str
) -> list[tuple[Segment, ...]]:
    """`render_turns` for training; its errors name data and record."""
    try:
        return render_turns(template.with_system(record.system), record.turns, turns)
    except RecordError as error:
        raise RecordError(error.kind, f"{records.path}: {record.name}: {error}") from None


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
    """Checks and measures all `records`; raises LlavaError at the first fault.

    tokenizer: without one all lengths are 0. findings: what to do about a fault instead.

    Records that are sound but too long (nothing supervised left, an image cut) or have more than
    `row_format.tiles` images are refused with the reason; so are those with bad images, if
    `policy.skip`.
    """
    findings = findings or Findings()
    cache = _Cache(cache_dir, records, tokenizer, row_format)
    demands = f"{policy.max_pixels} {row_format.image.size} {row_format.image.mode}"
    faults: dict[int, RecordError] = {}
    # Nothing can change in a data set that holds its images and was found good before.
    if cache.lengths is None or cache.images_seen != f"within the data set {demands}":
        scan = _Scan(records, tokenizer, row_format, policy.skip, findings)
        scan.run(tokenize=cache.lengths is None, progress=progress)
        if cache.lengths is None:
            cache.lengths, cache.image_counts, cache.refused, cache.cut = scan.results()
            cache.write()
        where = "within the data set" if records.image_root is None else scan.files_state()
        if cache.images_seen != f"{where} {demands}" or scan.missing:
            faults = scan.missing | _image_faults(
                records, {*scan.missing, *scan.unusable}, row_format, policy, threads, progress,
                findings,
            )  # fmt: skip
            cache.images_seen = "" if faults else f"{where} {demands}"
            cache.write()
    messages = [str(faults[index]) for index in sorted(faults)]
    if len(faults) > policy.ceiling:
        error = LlavaError(
            f"{len(faults)} records have bad images, more than bad_image_ceiling={policy.ceiling}; "
            f"the first: {messages[0]}"
        )
        findings.fault(None, error)
    refused = _add(cache.refused, "bad image", sorted(faults))
    crowded = np.flatnonzero(cache.image_counts > row_format.tiles).tolist()
    refused = _add(refused, f"more images than images_per_row={row_format.tiles}", crowded)
    return Measured(cache.lengths, cache.image_counts, refused, messages, cache.cut)


def _add(refused: dict[str, list[int]], reason: str, indices: list[int]):
    """`refused` with those of `indices` that no earlier reason has."""
    taken = {index for known in refused.values() for index in known}
    rest = [index for index in indices if index not in taken]
    return {**refused, reason: rest} if rest else dict(refused)


class _Scan:
    """One pass over the records: checks, token counts, and the state of the image files."""

    def __init__(self, records, tokenizer, row_format, skip_missing_images, findings):
        self._records, self._tokenizer, self._format = records, tokenizer, row_format
        self._skip_missing, self._findings = skip_missing_images, findings
        self._lengths = np.zeros(len(records), np.int64)
        self._image_counts = np.zeros(len(records), np.int64)
        self._refused: dict[str, list[int]] = {}
        self._cut = 0
        self._waiting: list[tuple[int, list[tuple[Segment, ...]], list[int]]] = []
        self._files_state = hashlib.sha256()
        self.missing: dict[int, RecordError] = {}
        self.unusable: set[int] = set()  # faulty, where that does not end the scan

    def results(self):
        return self._lengths, self._image_counts, self._refused, self._cut

    def files_state(self) -> str:
        """Changes when a path, size or time of modification of an image file does."""
        return self._files_state.hexdigest()

    def run(self, tokenize: bool, progress: bool) -> None:
        records = self._records
        for index in tqdm(
            range(len(records)), "checking records", unit=" records", disable=not progress
        ):
            record = self._check(index)
            if record is None:
                continue
            self._findings.record(record)
            self._image_counts[index] = len(record.images)
            if index not in self.missing:
                self._note_files(record)
            if tokenize:
                self._render(index, record)
        self._tokenize()

    def _render(self, index: int, record: Record) -> None:
        try:
            texts = render_record(self._format.template, self._records, record, self._format.turns)
        except RecordError as error:
            self._fault(index, error)
            return
        if self._tokenizer is not None:
            images = [self._format.tokens_per_tile] * len(record.images)
            self._waiting.append((index, texts, images))
            if len(self._waiting) == _CHUNK:
                self._tokenize()

    def _fault(self, index: int, error: RecordError) -> None:
        self._findings.fault(index, error)
        self.unusable.add(index)

    def _check(self, index: int) -> Record | None:
        try:
            return checked_record(self._records, index)
        except RecordError as error:
            if self._skip_missing and error.kind == "missing image":
                self.missing[index] = error
                return self._records[index]
            self._fault(index, error)

    def _note_files(self, record: Record) -> None:
        for path in record.images:
            if isinstance(path, str):
                status = os.stat(path)
                state = f"{path}\0{status.st_size}\0{status.st_mtime_ns}\0"
                self._files_state.update(state.encode(errors="surrogateescape"))

    def _tokenize(self) -> None:
        if not self._waiting:
            return
        max_length = self._format.max_length
        if self._format.turns == "conversation":
            texts, images = [w[1][0] for w in self._waiting], [w[2] for w in self._waiting]
            measured = self._tokenizer.lengths(texts, images)
        else:
            rows = (token_row(self._tokenizer, *texts) for _, *texts in self._waiting)
            measured = [len(row) for row in rows]
        for (index, *texts), length in zip(self._waiting, measured, strict=True):
            full, reason = int(length), None
            if length > max_length:
                row, reason = truncate(token_row(self._tokenizer, *texts), max_length)
                length = 0 if row is None else len(row)
                self._cut += row is not None
                if row is None:
                    reason = f"{reason} at max_length={max_length}"
                    self._refused.setdefault(reason, []).append(index)
            self._findings.tokens(index, full, reason)
            self._lengths[index] = length
        self._waiting = []


def _image_faults(
    records,
    known: set[int],
    row_format: RowFormat,
    policy: ImagePolicy,
    threads: int,
    progress: bool,
    findings: Findings,
):
    """record number -> error, of records with bad images; a fault unless `policy.skip`."""

    look = policy.look or inspect_image

    def inspect(index: int) -> RecordError | None:
        record = records[index]
        try:
            for source, name in zip(record.images, record.image_names, strict=True):
                size = look(source, name, policy.max_pixels)
                check_shape(size, row_format.image, name, policy.max_pixels)
        except ImageError as error:
            return RecordError(error.kind, f"{records.path}: {record.name}: {error}")

    indices = [index for index in range(len(records)) if index not in known]
    faults = {}
    with ThreadPool(threads) as pool:
        results = pool.imap(inspect, indices, chunksize=16)
        bar = tqdm(results, "checking images", len(indices), unit=" records", disable=not progress)
        for index, error in zip(indices, bar, strict=True):
            if error is not None:
                if policy.skip:
                    faults[index] = error
                else:
                    findings.fault(index, error)
    return faults


class _Cache:
    """Lengths of one combination of data, tokenizer, template and max_length, in a file.

    `images_seen`: the image files, and what was asked of them, when all were last found good.
    """

    def __init__(self, folder, records, tokenizer, row_format):
        self.lengths = self.image_counts = None
        self.refused: dict[str, list[int]] = {}
        self.cut = 0
        self.images_seen = ""
        self._path = None
        if folder is None:
            return
        key = hashlib.sha256()
        for part in (
            _CACHE_VERSION, records.fingerprint(),
            tokenizer.fingerprint(row_format.tokens_per_tile), row_format.template,
            row_format.max_length, row_format.turns,
        ):  # fmt: skip
            key.update(f"{part}\0".encode())
        self._path = Path(folder) / f"lengths-{key.hexdigest()[:32]}.npz"
        try:
            with np.load(self._path) as data:
                self.refused = json.loads(str(data["refused"]))
                self.images_seen = str(data["images_seen"])
                self.cut = int(data["cut"])
                self.lengths, self.image_counts = data["lengths"], data["image_counts"]
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
                image_counts=self.image_counts,
                refused=json.dumps(self.refused),
                images_seen=self.images_seen,
                cut=self.cut,
            )
