"""Every check of training over a whole data set, and a decoded look at each image, before any run.

A fault is what training would stop at. A note is what it would do without stopping: leave a record
out, cut it, ignore a key.
"""

import collections
import os
import re
import threading
from collections.abc import Callable
from multiprocessing.pool import ThreadPool

import numpy as np
from tqdm import tqdm

from llava_jax.data import sources
from llava_jax.data.measuring import Findings, ImagePolicy, measure
from llava_jax.data.media import MAX_PIXELS, ImageError, load_image
from llava_jax.data.parsing import Record
from llava_jax.data.pipeline import TrainingData
from llava_jax.data.rows import RowFormat
from llava_jax.data.video import Video
from llava_jax.errors import LlavaError, RecordError, brief
from llava_jax.models.images import ImageSpec

_SHOWN = 3  # culprits printed of each kind
_BAR_WIDTH = 40


class Report(Findings):
    """What `validate` found.

    Attributes:
      faults, notes: kind -> messages, one for each culprit.
      lengths: tokens of each record that could be tokenized, before it is cut.
      faulty: numbers of the records with faults.
      images_total: image files, and images within a data set, that were decoded.
    """

    def __init__(self, records, row_format: RowFormat, special_tokens=()):
        self.records_total, self.images_total = len(records), 0
        self.faults: dict[str, list[str]] = collections.defaultdict(list)
        self.notes: dict[str, list[str]] = collections.defaultdict(list)
        self.lengths: list[int] = []
        self.faulty: set[int] = set()
        self._records, self._max_length = records, row_format.max_length
        self._first_of_id: dict[str, int] = {}
        tokens = [re.escape(token) for token in special_tokens if token.strip()]
        self._special = re.compile("|".join(tokens) or r"(?!)")

    def fault(self, index: int | None, error: LlavaError) -> None:
        kind = error.kind if isinstance(error, RecordError) else "of the data as a whole"
        if index is not None:
            self.faulty.add(index)
        self.faults[kind].append(str(error).removeprefix(f"{self._records.path}: "))

    def record(self, record: Record) -> None:
        note = lambda kind, text: self.notes[kind].append(text)
        first = self._first_of_id.setdefault(record.id, record.index)
        if first != record.index:
            note(
                "repeated id",
                f"records {first} and {record.index} have the same id {brief(record.id)}",
            )
        for key in record.ignored_keys:
            note(f"ignored key {brief(key)}", record.name)
        if record.system is not None:
            note(
                "system prompt in place of the template's",
                f"{record.name}: {brief(record.system)}",
            )
        texts = {f"turn {position}": turn.text for position, turn in enumerate(record.turns)}
        for place, text in (texts | {"rejected": record.rejected or ""}).items():
            if match := self._special.search(text):
                note("special token in the text", f"{record.name}, {place}: {match.group()!r}")

    def tokens(self, index: int, length: int, reason: str | None) -> None:
        self.lengths.append(length)
        if length > self._max_length:
            kind = f"cut when training at max_length={self._max_length}"
            if reason:
                kind = f"left out when training: {reason}"
            self.notes[kind].append(f"{self._records[index].name} has {length:,} tokens")

    def left_out(self, refused: dict[str, list[int]]) -> None:
        """Notes the records that training leaves out for another reason than their length."""
        for reason, indices in refused.items():
            kind = f"left out when training: {reason}"
            if kind not in self.notes:
                self.notes[kind] += [self._records[index].name for index in indices]

    def text(self) -> str:
        """The report as printed."""
        lines = [f"{self.records_total:,} records, {self.images_total:,} image files"]
        for title, table in (("faults", self.faults), ("notes", self.notes)):
            total = sum(map(len, table.values()))
            lines += ["", f"{title}: {total:,}" if total else f"no {title}"]
            for kind, messages in sorted(table.items(), key=lambda entry: -len(entry[1])):
                lines.append(f"{len(messages):>10,}  {kind}")
                lines += [f"{'':12}{message}" for message in messages[:_SHOWN]]
                if len(messages) > _SHOWN:
                    lines.append(f"{'':12}… and {len(messages) - _SHOWN:,} more")
        if self.lengths:
            lines += ["", *histogram(self.lengths, self._max_length)]
        return "\n".join(lines)


def histogram(lengths, max_length: int) -> list[str]:
    """Text bars of token counts; the last line counts what is longer than `max_length`."""
    lengths = np.asarray(lengths)
    lines = [
        f"tokens a record: min {lengths.min():,}, median {int(np.median(lengths)):,}, "
        f"99% {int(np.quantile(lengths, 0.99)):,}, max {lengths.max():,}, sum {lengths.sum():,}"
    ]
    top = min(int(lengths.max()), max_length)
    edges = np.unique(np.linspace(0, top + 1, 13).astype(int))
    counts = np.histogram(lengths, bins=edges)[0].tolist()
    # The last bin of np.histogram includes its right edge, which is above max_length here.
    counts[-1] = int(((lengths >= edges[-2]) & (lengths < edges[-1])).sum())
    labels = [f"{a}-{b - 1}" for a, b in zip(edges[:-1], edges[1:], strict=True)]
    if over := int((lengths > max_length).sum()):
        counts, labels = [*counts, over], [*labels, f">{max_length}"]
    scale = _BAR_WIDTH / max(counts)
    for label, count in zip(labels, counts, strict=True):
        lines.append(f"{label:>13} {'█' * max(round(count * scale), count > 0)} {count:,}")
    return lines


def validate(
    records,
    row_format: RowFormat,
    tokenizer=None,
    max_pixels: int = MAX_PIXELS,
    progress: bool = True,
    threads: int | None = None,
    accept: Callable[[TrainingData], None] = lambda data: None,
    **training,
) -> Report:
    """Checks every record of `open_records(...)` as training does and decodes every image it uses.

    Args:
      tokenizer: a Hugging Face fast tokenizer; without one nothing is said about lengths.
      threads: decode images; by default one for each CPU core.
      accept: raises LlavaError for sound data that cannot be trained on.
      training: further arguments of `TrainingData`; by default batches of one row.
    """
    special = tokenizer.all_special_tokens if tokenizer is not None else ()
    report, refused = Report(records, row_format, special), {}
    common = {"threads": threads or os.cpu_count(), "progress": progress, "findings": report}
    ceiling = training.get("bad_image_ceiling", 0)
    policy = ImagePolicy(max_pixels, training.get("bad_image") == "skip", ceiling)
    try:
        if tokenizer is None:
            refused = measure(records, None, row_format, policy, **common).refused
        else:
            training = {"batch_size": 1, "epochs": 1, "max_pixels": max_pixels} | training
            data = TrainingData(records, tokenizer, row_format, **common, **training)
            refused = data.refused
            accept(data)
    except LlavaError as error:  # no record is of use, or too few for a batch
        if not report.faults:
            report.fault(None, error)
    report.left_out(refused)
    decode = _Decoder(records, row_format.image, max_pixels)
    _decode_images(report, decode, refused, policy, common["threads"], progress)
    return report


def _decode_images(
    report: Report, decode: "_Decoder", refused, policy: ImagePolicy, threads, progress
):
    """Decodes the images of the records that training uses: it meets damage in their middle."""
    unused = {*report.faulty, *(index for indices in refused.values() for index in indices)}
    used = [index for index in range(report.records_total) if index not in unused]
    damaged = []
    # Threads suffice: Pillow lets go of the interpreter while it decodes.
    with ThreadPool(threads) as pool:
        errors = pool.imap(decode, used, chunksize=8)
        bar = tqdm(errors, "decoding images", len(used), unit=" records", disable=not progress)
        for index, error in zip(used, bar, strict=True):
            if error is not None and policy.skip:
                damaged.append(index)
            elif error is not None:
                report.fault(index, error)
    report.images_total = decode.total
    report.left_out({"damaged image": damaged} if damaged else {})
    left_out = len(damaged) + len(refused.get("bad image", ()))
    if damaged and left_out > policy.ceiling:
        report.fault(
            None,
            LlavaError(
                f"{left_out} records have bad images, more than bad_image_ceiling={policy.ceiling}"
            ),
        )


class _Decoder:
    """Number of a record -> the error of its first image that cannot be decoded, or None."""

    def __init__(self, records, spec: ImageSpec, max_pixels: int):
        self._records, self._spec, self._max_pixels = records, spec, max_pixels
        self._known: dict[str, ImageError | None] = {}  # each file is decoded once
        self._lock = threading.Lock()
        self._in_records = 0  # images that are no files

    def __call__(self, index: int) -> RecordError | None:
        record = self._records[index]
        for source, name in zip(record.images, record.image_names, strict=True):
            path = source.source if isinstance(source, Video) else source
            if isinstance(path, str) and path in self._known:
                error = self._known[path]
            else:
                error = self._decode(source, path, name)
            if error is not None:
                return RecordError(error.kind, f"{record.name}: {error}")
        return None

    @property
    def total(self) -> int:
        return len(self._known) + self._in_records

    def _decode(self, source: sources.Media, path: str | bytes, name: str) -> ImageError | None:
        error = None
        try:
            if isinstance(source, Video):
                sources.tiles(source, self._spec, name, self._max_pixels)
            else:
                load_image(source, name, self._max_pixels)
        except ImageError as found:
            error = found
        with self._lock:
            if isinstance(path, str):
                self._known[path] = error
            else:
                self._in_records += 1
        return error
