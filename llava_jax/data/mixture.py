"""A mixture of record files: LLaVA-NeXT's list of data sets, a YAML file.

    datasets:
      - json_path: ocr.json
        sampling_strategy: all          # the default
      - json_path: chat.jsonl
        sampling_strategy: random:10%   # or first:N, end:N, random:N, each N a number or P%

A path is relative to the YAML file. What is drawn is a pure function of the seed: unlike there, all
processes and all runs of a seed draw the same. The records of the files follow each other, and are
shuffled like those of one file.
"""

import bisect
import dataclasses
import difflib
import hashlib
import os
import re
from collections import Counter
from pathlib import Path

import numpy as np
import yaml

from llava_jax.data.parsing import Record, brief
from llava_jax.data.records import JsonRecords
from llava_jax.errors import LlavaError, RecordError

_KEYS = ("json_path", "sampling_strategy")
_STRATEGY = re.compile(r"(first|end|random):\s*(\d+)(%?)")


@dataclasses.dataclass(frozen=True)
class Part:
    """One file of a mixture.

    Attributes:
      name: its path as the list has it.
      strategy: how records are chosen of it.
      records: all that it holds.
      chosen: int64[n], which of them are used, in their order.
    """

    name: str
    strategy: str
    records: JsonRecords
    chosen: np.ndarray


class MixedRecords:
    """The records that a mixture draws; pickled by path, so workers read it again.

    Args:
      image_root: folder that image paths start from; by default that of the YAML file.
      seed: of the draws.
    """

    def __init__(self, path: str | os.PathLike, image_root=None, seed: int = 0):
        self.path, self.seed = str(path), seed
        self.image_root = str(image_root if image_root is not None else Path(path).parent)
        self.ignored_options = set()
        self._parts = []
        for number, entry in enumerate(_read_list(Path(path), self.ignored_options)):
            self._parts.append(_draw(Path(path), entry, number, self.image_root, seed))
        self._ends = np.cumsum([len(part.chosen) for part in self._parts]).tolist()

    @property
    def holds_boxes(self) -> bool:
        """Whether a record of one of the files may have boxes."""
        return any(part.records.holds_boxes for part in self._parts)

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
        return dataclasses.replace(
            record, index=int(index), origin=f"number {place} of {part.name}"
        )

    def __getstate__(self):
        return {"path": self.path, "image_root": self.image_root, "seed": self.seed}

    def __setstate__(self, state):
        self.__init__(**state)

    def fingerprint(self) -> str:
        """SHA-256 over the files' fingerprints and what was drawn of each, in hex."""
        digest = hashlib.sha256(b"mixture 1")
        for part in self._parts:
            digest.update(part.records.fingerprint().encode())
            digest.update(part.chosen.tobytes())
        return digest.hexdigest()

    def ignored_keys(self) -> dict[str, int]:
        """key that nothing reads -> number of records with it, in the files as a whole."""
        counts = Counter()
        for part in self._parts:
            counts.update(part.records.ignored_keys())
        return dict(counts.most_common())

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


def _read_list(path: Path, ignored: set[str]) -> list[dict]:
    """The entries of the file; keys that nothing reads are added to `ignored`."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise LlavaError(f"{path} is not valid YAML{where}") from None
    entries = content.get("datasets") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise LlavaError(f"{path} must hold a list 'datasets' of json_path and sampling_strategy")
    _check_keys(path, "", content, ("datasets",), ignored)
    for number, entry in enumerate(entries):
        where = f", entry {number}"
        if not isinstance(entry, dict):
            raise LlavaError(f"{path}{where}: expected json_path: FILE, not {brief(entry)}")
        _check_keys(path, where, entry, _KEYS, ignored)
        if not isinstance(entry.get("json_path"), str):
            raise LlavaError(f"{path}{where} has no json_path: name its .json or .jsonl file")
    return entries


def _check_keys(path: Path, where: str, values: dict, known: tuple[str, ...], ignored: set[str]):
    """Unknown keys are noted; one that looks like a slip of the pen is an error."""
    for key in map(str, values):
        if key not in known:
            if close := difflib.get_close_matches(key, known, 1, 0.75):
                raise LlavaError(f"{path}{where}: unknown key {key!r}, did you mean {close[0]!r}?")
            ignored.add(key)


def _draw(path: Path, entry: dict, number: int, image_root: str, seed: int) -> Part:
    """The records that entry `number` of the list chooses."""
    name, strategy = entry["json_path"], str(entry.get("sampling_strategy") or "all")
    where = f"{path}, entry {number}"
    file = path.parent / name
    if file.suffix not in (".json", ".jsonl"):
        raise LlavaError(f"{where}: {name} is no .json or .jsonl file")
    if not file.is_file():
        raise LlavaError(f"{where}: no data file at {file}")
    records = JsonRecords(file, image_root)
    every = np.arange(len(records))
    if strategy == "all":
        chosen = every
    elif match := _STRATEGY.fullmatch(strategy):
        kind, count = match[1], int(match[2])
        count = -(-count * len(every) // 100) if match[3] else count  # rounded up
        if kind == "random":
            source = np.random.Philox(np.random.SeedSequence([seed, number]))
            chosen = np.sort(np.random.Generator(source).permutation(every)[:count])
        else:
            chosen = every[:count] if kind == "first" else every[max(len(every) - count, 0) :]
    else:
        raise LlavaError(
            f"{where}: sampling_strategy is {strategy!r}: give all, first:N, end:N or random:N, "
            "with N a number of records or a share such as 10%"
        )
    if not len(chosen):
        raise LlavaError(f"{where}: {strategy} of {name} with {len(every)} records is nothing")
    return Part(name, strategy, records, chosen)
