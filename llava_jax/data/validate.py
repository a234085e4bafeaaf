"""`llava-jax validate`: every check over a whole data set, before any training.

Faults (a record that training would refuse or stumble over) make the exit code 1. What depends on
the chosen tokenizer and length (conversations that are cut, or lose their answer) is only noted.
"""

import collections
import dataclasses
import os
import re
import threading
from multiprocessing.pool import ThreadPool

import numpy as np
from tqdm import tqdm

from llava_jax.data.media import MAX_PIXELS, load_image
from llava_jax.data.parsing import Record, brief, check_record
from llava_jax.data.records import open_records
from llava_jax.errors import RecordError
from llava_jax.text.templates import TEMPLATES, get_template, render
from llava_jax.text.tokenization import SegmentTokenizer, truncate
from llava_jax.text.tokenizer import load_tokenizer

_SHOWN = 3  # culprits printed of each kind
_BAR_WIDTH = 40
_CHUNK = 512  # records tokenized at a time


def add_arguments(parser) -> None:
    """The arguments of `llava-jax validate`."""
    parser.add_argument("data", help="LLaVA JSON or JSONL file, or a data set folder")
    parser.add_argument("--image_root", help="folder that image paths start from")
    parser.add_argument("--split", help="split of a data set (default: train)")
    parser.add_argument(
        "--template", default="v1", choices=sorted(TEMPLATES), metavar="NAME",
        help=f"conversation template: {', '.join(sorted(TEMPLATES))} (default: v1)",
    )  # fmt: skip
    parser.add_argument("--tokenizer", help="tokenizer folder; measures lengths too")
    parser.add_argument("--max_length", type=int, default=2048, help="tokens a row holds")
    parser.add_argument("--image_tokens", type=int, default=576, help="tokens an image takes")
    parser.add_argument("--max_pixels", type=int, default=MAX_PIXELS, help="limit of an image")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="decoding threads")


def main(args) -> int:
    """Runs `llava-jax validate`, prints its report; returns 1 if there is any fault."""
    report = validate(
        open_records(args.data, args.image_root, args.split),
        args.template,
        load_tokenizer(args.tokenizer) if args.tokenizer else None,
        args.max_length,
        args.image_tokens,
        args.max_pixels,
        args.workers,
    )
    print(report.text())
    return 1 if report.faults else 0


class Report:
    """What `validate` found.

    faults, notes: kind -> messages, one for each culprit. lengths: tokens of each sound record.
    """

    def __init__(self, records_total: int, max_length: int):
        self.records_total, self.max_length = records_total, max_length
        self.images_total = 0
        self.faults: dict[str, list[str]] = collections.defaultdict(list)
        self.notes: dict[str, list[str]] = collections.defaultdict(list)
        self.lengths: list[int] = []

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
            lines += ["", *histogram(self.lengths, self.max_length)]
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
    template: str = "v1",
    tokenizer=None,
    max_length: int = 2048,
    image_tokens: int = 576,
    max_pixels: int = MAX_PIXELS,
    workers: int | None = None,
    progress: bool = True,
) -> Report:
    """Checks every record of `open_records(...)` and decodes every image; gives a Report.

    Lengths, cuts and special tokens are looked at where a Hugging Face `tokenizer` is given.
    """
    report = Report(len(records), max_length)
    inspect = _Inspector(records, max_pixels)
    measure = None
    if tokenizer is not None:
        measure = _Measurer(tokenizer, template, max_length, image_tokens, report)
    seen: dict[str, int] = {}
    # Threads suffice: Pillow lets go of the interpreter while it decodes.
    with ThreadPool(workers or os.cpu_count()) as pool:
        results = pool.imap(inspect, range(len(records)), chunksize=8)
        for index, (record, errors) in enumerate(
            tqdm(results, "validating", len(records), unit=" records", disable=not progress)
        ):
            for error in errors:
                report.faults[error.kind].append(_name_record(error, record))
            if record is None:
                continue
            if record.id in seen:
                report.notes["repeated id"].append(
                    f"records {seen[record.id]} and {index} have the same id {brief(record.id)}"
                )
            seen.setdefault(record.id, index)
            for key in record.ignored_keys:
                report.notes[f"ignored key {brief(key)}"].append(record.name)
            if record.system is not None:
                report.notes["system prompt in place of the template's"].append(
                    f"{record.name}: {brief(record.system)}"
                )
            if measure is not None and not errors:
                measure.add(record)
    report.images_total = inspect.images_total
    if measure is not None:
        measure.finish()
    return report


def _name_record(error: RecordError, record: Record | None) -> str:
    text = str(error)
    return text if record is None or text.startswith("record ") else f"{record.name}: {text}"


class _Inspector:
    """Index -> the record without its image data (None if unparsable) and its faults."""

    def __init__(self, records, max_pixels: int):
        self._records, self._max_pixels = records, max_pixels
        self._decoded: set[str] = set()
        self._lock = threading.Lock()
        self.images_total = 0

    def __call__(self, index: int) -> tuple[Record | None, list[RecordError]]:
        try:
            record = self._records[index]
        except RecordError as error:
            return None, [error]
        errors = []
        try:
            check_record(record, self._records.image_root)
        except RecordError as error:
            errors.append(error)
        if not any(error.kind in ("missing image", "image outside the root") for error in errors):
            errors += self._decode(record)
        names = record.image_names
        return dataclasses.replace(record, images=names), errors

    def _decode(self, record: Record) -> list[RecordError]:
        errors = []
        for source, name in zip(record.images, record.image_names, strict=True):
            with self._lock:
                if source in self._decoded:
                    continue
                self.images_total += 1
                if isinstance(source, str):
                    self._decoded.add(source)
            try:
                load_image(source, name, self._max_pixels)
            except RecordError as error:
                errors.append(error)
        return errors


class _Measurer:
    """Collects lengths, cuts and special tokens into a report, tokenizing many records at once."""

    def __init__(self, tokenizer, template: str, max_length: int, image_tokens: int, report):
        self._tokenizer, self._image_tokens = SegmentTokenizer(tokenizer), image_tokens
        self._template = get_template(template)
        self._max_length, self._report = max_length, report
        tokens = [token for token in tokenizer.all_special_tokens if token.strip()]
        self._special = re.compile("|".join(map(re.escape, tokens)) or r"(?!)")
        self._waiting = []

    def add(self, record: Record) -> None:
        for position, turn in enumerate(record.turns):
            if match := self._special.search(turn.text):
                self._report.notes["special token in the text"].append(
                    f"{record.name}, turn {position}: {match.group()!r}"
                )
        try:
            template = self._template.with_system(record.system)
            self._waiting.append((record, render(template, record.turns)))
        except RecordError as error:
            self._report.faults[error.kind].append(_name_record(error, record))
        if len(self._waiting) == _CHUNK:
            self.finish()

    def finish(self) -> None:
        lengths = self._tokenizer.lengths(
            [segments for _, segments in self._waiting],
            [[self._image_tokens] * len(record.images) for record, _ in self._waiting],
        )
        self._report.lengths += lengths.tolist()
        for (record, segments), length in zip(self._waiting, lengths, strict=True):
            if length > self._max_length:
                self._note_cut(record, segments, int(length))
        self._waiting = []

    def _note_cut(self, record: Record, segments, length: int) -> None:
        _, reason = truncate(
            self._tokenizer(segments, [self._image_tokens] * len(record.images)), self._max_length
        )
        kind = "left out when training: " + reason if reason else "cut when training"
        self._report.notes[f"{kind} (max_length {self._max_length})"].append(
            f"{record.name} has {length:,} tokens"
        )
