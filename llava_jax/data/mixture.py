"""A mixture of data sets: LLaVA-NeXT's list of them, a YAML file.

    datasets:
      - json_path: ocr.json
        sampling_strategy: all          # the default
      - json_path: chat.jsonl
        sampling_strategy: random:10%   # or first:N, end:N, random:N, each N a number or P%
      - path: ai2d                      # of any data set: a file, a pattern or a folder
        split: validation               # these three as in configs/base.py
        image_root: images
        columns: {question: query, answer: label}
        repeat: 3                       # what is chosen counts three times

In place of `repeat` all entries may have a `weight`. The share of an entry in the mixture is then
its weight among all weights: of the records that are chosen some are repeated or left out, so that
there are as many in the end.

A path is relative to the YAML file. What is drawn is a pure function of the seed: unlike there, all
processes and all runs of a seed draw the same. The records of the files follow each other, and are
shuffled like those of one file.
"""

import bisect
import dataclasses
import difflib
import hashlib
import itertools
import os
import re
from pathlib import Path

import numpy as np
import yaml

from llava_jax.data.buckets import Url, below, place
from llava_jax.data.chunks import Chunk
from llava_jax.data.collection import Collection, Records
from llava_jax.data.copies import local
from llava_jax.data.forms import check_columns
from llava_jax.data.parsing import Record
from llava_jax.data.records import holds_images, open_records
from llava_jax.errors import LlavaError, RecordError, brief

_PATHS = ("json_path", "path")  # the first is LLaVA-NeXT's
_KEYS = (*_PATHS, "sampling_strategy", "split", "image_root", "columns", "repeat", "weight")
_KINDS = {"split": str, "image_root": str, "columns": dict, "repeat": int, "weight": (int, float)}
_MOST = 10**8  # records of a mixture, a number of 8 bytes each
_STRATEGY = re.compile(r"(first|end|random):\s*(\d+)(%?)")


@dataclasses.dataclass(frozen=True)
class Part:
    """One data set of a mixture.

    Attributes:
      name: its path as the list has it.
      strategy: how records are chosen of it, in words.
      records: all that it holds.
      chosen: int64[n], which of them are used, in their order.
    """

    name: str
    strategy: str
    records: Records
    chosen: np.ndarray


class MixedRecords(Collection):
    """The records that a mixture draws.

    Args:
      image_root: folder that image paths start from; by default that of the YAML file.
      seed: of the draws.
      columns: of the data sets that have none of their own in the list.
      cache_dir: as in `open_records`.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        image_root: str | os.PathLike | None = None,
        seed: int = 0,
        columns: dict[str, str] | None = None,
        cache_dir: str | os.PathLike | None = None,
    ):
        self.path, self.seed, self.columns = str(path), seed, check_columns(columns or {})
        path = place(path)
        self.image_root = str(image_root if image_root is not None else path.parent)
        self.ignored_options = set()
        self._parts = []
        entries = _read_list(path, self.ignored_options)
        for number, entry in enumerate(entries):
            entry = {"columns": self.columns} | entry
            root = self.image_root
            if "image_root" in entry:
                root = str(below(path.parent, entry["image_root"]))
            self._parts.append(_draw(path, entry, number, root, seed, cache_dir))
        if "weight" in entries[0]:
            weights = [entry["weight"] for entry in entries]
            self._parts = _weighted(path, self._parts, weights, seed)
        self._ends = np.cumsum([len(part.chosen) for part in self._parts]).tolist()

    @property
    def pairs(self) -> bool:
        """As in `Records`, of all files."""
        return self._parts[0].records.pairs

    @pairs.setter
    def pairs(self, value: bool) -> None:
        for part in self._parts:
            part.records.pairs = value

    @property
    def image_roots(self) -> set[str]:
        return set().union(*(part.records.image_roots for part in self._parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect.bisect_right(self._ends, index)
        part = self._parts[number]
        place = int(part.chosen[index - self._ends[number]])  # counted from the end: negative
        try:
            record = part.records[place]
        except RecordError as error:
            raise RecordError(error.kind, f"record {index}, of {part.name}: {error}") from None
        origin = f"number {place} of {part.name}" + (record.origin and f", {record.origin}")
        return dataclasses.replace(record, index=int(index), origin=origin)

    def chunks(self) -> list[Chunk]:
        """What is chosen of each chunk of each data set: the same again where it is repeated."""
        found = []
        for number, part in enumerate(self._parts):
            first, theirs = self._ends[number] - len(part.chosen), part.records.chunks()
            of_place = np.searchsorted([chunk.stop for chunk in theirs], part.chosen, side="right")
            new = (np.diff(of_place) != 0) | (np.diff(part.chosen) <= 0)
            edges = [0, *(np.flatnonzero(new) + 1).tolist(), len(part.chosen)]
            for start, stop in itertools.pairwise(edges):
                chunk = theirs[of_place[start]]
                chosen, content = part.chosen[start:stop] - chunk.start, chunk.content
                if len(chosen) < len(chunk.numbers):
                    content += f" {hashlib.sha256(chosen.tobytes()).hexdigest()}"
                place = first + start, first + stop
                found.append(Chunk(*place, content, chunk.within, number))
        return found

    @property
    def sources(self) -> list[tuple[str, str]]:
        return [(f"{part.name}: ", part.records.sources[0][1]) for part in self._parts]

    def fingerprint(self) -> str:
        """SHA-256 over the files' fingerprints and what was drawn of each, in hex."""
        digest = hashlib.sha256(b"mixture 1")
        for part in self._parts:
            digest.update(part.records.fingerprint().encode())
            digest.update(part.chosen.tobytes())
        return digest.hexdigest()

    def shares(self) -> list[str]:
        """A line for each file: what is used of it, and its share of the mixture."""
        lines = [
            f"{part.name}: {len(part.chosen):,} of {len(part.records):,} records "
            f"({part.strategy}), {len(part.chosen) / len(self):.1%} of the mixture"
            for part in self._parts
        ]
        if self.ignored_options:
            lines.append(f"ignored keys of the list: {', '.join(sorted(self.ignored_options))}")
        return lines


def _read_list(path: Path | Url, ignored: set[str]) -> list[dict]:
    """The entries of the file; keys that nothing reads are added to `ignored`."""
    try:
        content = yaml.safe_load(local([path])[0].read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise LlavaError(f"{path} is not valid YAML{where}") from None
    entries = content.get("datasets") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise LlavaError(f"{path} must hold a list 'datasets' of json_path and sampling_strategy")
    if len({"weight" in entry for entry in entries if isinstance(entry, dict)}) > 1:
        raise LlavaError(f"{path}: give every entry a weight, or none")
    _check_keys(path, "", content, ("datasets",), ignored)
    for number, entry in enumerate(entries):
        where = f", entry {number}"
        if not isinstance(entry, dict):
            raise LlavaError(f"{path}{where}: expected json_path: FILE, not {brief(entry)}")
        _check_keys(path, where, entry, _KEYS, ignored)
        named = [key for key in _PATHS if entry.get(key) is not None]
        if len(named) != 1 or not isinstance(entry[named[0]], str):
            raise LlavaError(
                f"{path}{where} has {'a path too many' if named[1:] else 'no json_path'}: name its "
                "file or folder once, with json_path or path"
            )
        for key, kind in _KINDS.items():
            if key in entry and (not isinstance(entry[key], kind) or entry[key] is True):
                raise LlavaError(f"{path}{where}: {key} cannot be {brief(entry[key])}")
        if "repeat" in entry and ("weight" in entry or entry["repeat"] < 1):
            raise LlavaError(
                f"{path}{where}: repeat is {entry['repeat']}: give a number of times from 1, and "
                "no weight with it"
            )
        if "weight" in entry and not 0 < entry["weight"] < float("inf"):
            raise LlavaError(f"{path}{where}: weight is {entry['weight']}: it must be above 0")
    return entries


def _check_keys(
    path: Path | Url, where: str, values: dict, known: tuple[str, ...], ignored: set[str]
):
    """Unknown keys are noted; one that looks like a slip of the pen is an error."""
    for key in map(str, values):
        if key not in known:
            if close := difflib.get_close_matches(key, known, 1, 0.75):
                raise LlavaError(f"{path}{where}: unknown key {key!r}, did you mean {close[0]!r}?")
            ignored.add(key)


def _draw(path: Path | Url, entry: dict, number: int, image_root: str, seed, cache_dir) -> Part:
    """The records that entry `number` of the list chooses."""
    name, strategy = _name(entry), str(entry.get("sampling_strategy") or "all")
    where = f"{path}, entry {number}"
    file = below(path.parent, name)
    if file.suffix in (".yaml", ".yml"):
        raise LlavaError(f"{where}: {name} is a list itself: name its data sets here")
    root = None if holds_images(file) else image_root
    try:
        records = open_records(file, root, entry.get("split"), 0, entry["columns"], cache_dir)
    except LlavaError as error:
        raise LlavaError(f"{where}: {error}") from None
    every = np.arange(len(records))
    if strategy == "all":
        chosen = every
    elif match := _STRATEGY.fullmatch(strategy):
        kind, count = match[1], int(match[2])
        count = -(-count * len(every) // 100) if match[3] else count  # rounded up
        if kind == "random":
            chosen = np.sort(_random([seed, number]).permutation(every)[:count])
        else:
            chosen = every[:count] if kind == "first" else every[max(len(every) - count, 0) :]
    else:
        raise LlavaError(
            f"{where}: sampling_strategy is {strategy!r}: give all, first:N, end:N or random:N, "
            "with N a number of records or a share such as 10%"
        )
    if not len(chosen):
        raise LlavaError(f"{where}: {strategy} of {name} with {len(every)} records is nothing")
    if (times := entry.get("repeat", 1)) > 1:
        if len(chosen) * times > _MOST:
            raise LlavaError(
                f"{where}: {len(chosen):,} records {times:,} times are {len(chosen) * times:,}, "
                f"more than the {_MOST:,} of a mixture: take a smaller repeat"
            )
        chosen, strategy = np.tile(chosen, times), f"{strategy}, {times} times"
    return Part(name, strategy, records, chosen)


def _weighted(path: Path | Url, parts: list[Part], weights: list[float], seed: int) -> list[Part]:
    """As many records in all, each part's share that of its weight.

    Of 10 and 10 records with the weights 3 and 1 these are 15 and 5: every record of the first once
    and five of them, drawn at random, a second time; five of the second.
    """
    exact = np.array(weights) / sum(weights) * sum(len(part.chosen) for part in parts)
    counts = exact.astype(int)
    most_cut = np.argsort(counts - exact, kind="stable")
    counts[most_cut[: round(exact.sum()) - counts.sum()]] += 1
    found = []
    for number, (part, count) in enumerate(zip(parts, counts.tolist(), strict=True)):
        if not count:
            raise LlavaError(f"{path}, entry {number}: its weight leaves no record of {part.name}")
        times, rest = divmod(count, len(part.chosen))
        some = np.sort(_random([seed, number, 1]).permutation(part.chosen)[:rest])
        chosen = np.concatenate([np.tile(part.chosen, times), some])
        found.append(dataclasses.replace(part, chosen=chosen))
    return found


def _random(seed: list[int]) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed)))


def _name(entry: dict) -> str:
    return next(entry[key] for key in _PATHS if entry.get(key) is not None)
