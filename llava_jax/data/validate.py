"""Every check of training over a whole data set, and a decoded look at each image, before any run.

A fault is what training would stop at. A note is what it would do without stopping: leave a record
out, cut it, ignore a key.
"""

import collections
import functools
import os
import re
from array import array
from collections.abc import Callable

import numpy as np

from llava_jax.data import sources
from llava_jax.data.duplicates import Group, group_lines, groups
from llava_jax.data.fingerprints import (
    Collector,
    Decoder,
    Fingerprints,
    PictureSet,
    decode_all,
    digest,
)
from llava_jax.data.measuring import Findings, ImagePolicy, measure
from llava_jax.data.media import MAX_PIXELS
from llava_jax.data.parsing import Record
from llava_jax.data.pipeline import TrainingData
from llava_jax.data.rows import RowFormat
from llava_jax.data.statistics import Distribution, Texts, bars
from llava_jax.errors import LlavaError, RecordError, brief

_SHOWN = 3  # culprits printed of each kind
_KEPT = 20  # in memory


class Messages:
    """The first messages of a kind, and as `len` how many there were."""

    def __init__(self):
        self._count, self._kept = 0, []

    def add(self, text: Callable[[], str]) -> None:
        """Counts a message, which is made only if it is kept."""
        self._count += 1
        if len(self._kept) < _KEPT:
            self._kept.append(text())

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number):
        return self._kept[number]


class Report(Findings):
    """What `validate` found.

    Attributes:
      faults, notes: kind -> messages, one for each culprit, of which the first are kept.
      lengths, tiles: tokens of each record that could be tokenized, before it is cut, and tiles.
      faulty: numbers of the records with faults.
      texts: what the conversations are like.
      images_total: image files, and images within a data set, that were decoded.
      fingerprints: of the pictures among them; none unless they were asked for.
    """

    def __init__(self, records, row_format: RowFormat, tokenizer=None):
        self.records_total, self.images_total = len(records), 0
        self.fingerprints: Fingerprints = Collector().finish()
        self.texts = Texts(tokenizer)
        self.faults: dict[str, Messages] = collections.defaultdict(Messages)
        self.notes: dict[str, Messages] = collections.defaultdict(Messages)
        self.lengths, self.tiles = array("i"), array("i")
        self.faulty: set[int] = set()
        self.records, self._format = records, row_format
        self._ids, self._numbers = array("Q"), array("i")  # of sound records
        special = tokenizer.all_special_tokens if tokenizer is not None else ()
        tokens = [re.escape(token) for token in special if token.strip()]
        self._special = re.compile("|".join(tokens) or r"(?!)")

    def fault(self, index: int | None, error: LlavaError) -> None:
        kind = error.kind if isinstance(error, RecordError) else "of the data as a whole"
        if index is not None:
            self.faulty.add(index)
        self.faults[kind].add(lambda: str(error).removeprefix(f"{self.records.path}: "))

    def record(self, record: Record) -> None:
        self.texts.add(record)
        self._ids.append(digest(record.id.encode(errors="surrogatepass")))
        self._numbers.append(record.index)
        note = lambda kind, text="": self.notes[kind].add(lambda: record.name + text)
        for key in record.ignored_keys:
            note(f"ignored key {brief(key)}")
        if record.system is not None:
            note("system prompt in place of the template's", f": {brief(record.system)}")
        texts = {f"turn {position}": turn.text for position, turn in enumerate(record.turns)}
        for place, text in (texts | {"rejected": record.rejected or ""}).items():
            if match := self._special.search(text):
                note("special token in the text", f", {place}: {match.group()!r}")

    def tokens(self, index: int, length: int, tiles: int, reason: str | None) -> None:
        self.lengths.append(length)
        self.tiles.append(tiles)
        if length > self._format.max_length:
            kind = f"cut when training at max_length={self._format.max_length}"
            if reason:
                kind = f"left out when training: {reason}"
            self.notes[kind].add(lambda: f"{self.records[index].name} has {length:,} tokens")

    def left_out(self, refused: dict[str, list[int]]) -> None:
        """Notes the records that training leaves out for another reason than their length."""
        for reason, indices in refused.items():
            kind = f"left out when training: {reason}"
            for index in indices if kind not in self.notes else ():
                self.notes[kind].add(lambda index=index: self.records[index].name)

    def repeated_ids(self) -> None:
        """Notes the records whose id an earlier one has; all records were seen."""
        ids, numbers = np.array(self._ids, np.uint64), np.array(self._numbers, np.int32)
        _, first, of_record = np.unique(ids, return_index=True, return_inverse=True)
        for place in np.flatnonzero(first[of_record] != np.arange(len(ids))).tolist():
            pair = int(numbers[first[of_record[place]]]), int(numbers[place])
            self.notes["repeated id"].add(
                lambda pair=pair: (
                    f"records {pair[0]} and {pair[1]} have the same id "
                    f"{brief(self.records[pair[1]].id)}"
                )
            )

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
            lengths = self.distributions()[0]
            lines += ["", lengths.summary(), *bars(lengths.bins())]
        lines += ["", *(one.summary() for one in self.distributions()[bool(self.lengths) :])]
        lines += self.texts.lines(self.records)
        if len(self.fingerprints):
            lines += ["", *group_lines(self.groups, self.fingerprints, self.records)]
        return "\n".join(lines)

    def distributions(self) -> list[Distribution]:
        """Of all that is counted, first the tokens of a record."""
        found = []
        if self.lengths:
            found.append(Distribution("tokens a record", self.lengths, self._format.max_length))
            if self._format.image.by_size:
                found.append(Distribution("tiles a record", self.tiles, self._format.tiles))
        return found + self.texts.distributions()

    @property
    def pictures(self) -> PictureSet:
        """What other data sets are compared with."""
        return PictureSet(self.records, self.fingerprints, [])

    @functools.cached_property
    def groups(self) -> list[Group]:
        """Pictures that are the same; the data are complete when it is asked for."""
        return groups(self.fingerprints)


def validate(
    records,
    row_format: RowFormat,
    tokenizer=None,
    max_pixels: int = MAX_PIXELS,
    progress: bool = True,
    threads: int | None = None,
    accept: Callable[[TrainingData], None] = lambda data: None,
    fingerprints: bool = False,
    **training,
) -> Report:
    """Checks every record of `open_records(...)` as training does and decodes every image it uses.

    Args:
      tokenizer: a Hugging Face fast tokenizer; without one nothing is said about lengths.
      threads: decode images; by default one for each CPU core.
      accept: raises LlavaError for sound data that cannot be trained on.
      fingerprints: whether pictures are to be compared, with each other or with other data.
      training: further arguments of `TrainingData`; by default batches of one row.
    """
    report, refused = Report(records, row_format, tokenizer), {}
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
    report.repeated_ids()
    look = lambda video, name: sources.tiles(video, row_format.image, name, policy.max_pixels)
    decoder = Decoder(records, max_pixels, look, fingerprints)
    _decode_images(report, decoder, refused, policy, common["threads"], progress)
    return report


def _decode_images(
    report: Report, decoder: Decoder, refused, policy: ImagePolicy, threads: int, progress: bool
) -> None:
    """Decodes the images of the records that training uses: it meets damage in their middle."""
    is_used, damaged = np.ones(report.records_total, bool), []
    for indices in (report.faulty, *refused.values()):
        is_used[list(indices)] = False
    used = np.flatnonzero(is_used)
    for index, error in decode_all(decoder, used, threads, "decoding images", progress):
        if error is not None and policy.skip:
            damaged.append(index)
        elif error is not None:
            report.fault(index, error)
    report.images_total, report.fingerprints = decoder.total, decoder.collector.finish()
    report.left_out({"damaged image": damaged} if damaged else {})
    left_out = len(damaged) + len(refused.get("bad image", ()))
    if damaged and left_out > policy.ceiling:
        report.fault(
            None,
            LlavaError(
                f"{left_out} records have bad images, more than bad_image_ceiling={policy.ceiling}"
            ),
        )
