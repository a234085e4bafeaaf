"""What the conversations of a data set are like: lengths, writing systems, answers that repeat."""

import functools
import itertools
import unicodedata
from array import array
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from llava_jax.data.fingerprints import digest
from llava_jax.data.parsing import Record
from llava_jax.errors import brief
from llava_jax.text.conversation import MARKS
from llava_jax.text.tokenization import fast_core

_BAR_WIDTH = 40
_BINS = 12
_SHOWN = 5  # of the most common answers, and of writing systems
_AT_ONCE = 1024  # answers tokenized


class Distribution(NamedTuple):
    """Numbers from 0, one each of whatever is counted.

    limit: what is larger is in a bin of its own; None for no limit.
    """

    name: str
    values: Sequence[int]
    limit: int | None = None

    def summary(self) -> str:
        """One line."""
        values = np.asarray(self.values)
        return (
            f"{self.name}: min {values.min():,}, median {int(np.median(values)):,}, "
            f"99% {int(np.quantile(values, 0.99)):,}, max {values.max():,}, sum {values.sum():,}"
        )

    def bins(self) -> list[tuple[str, int]]:
        """(range, how many are in it); the last one may be what is over the limit."""
        values = np.asarray(self.values)
        limit = int(values.max()) if self.limit is None else self.limit
        top = min(int(values.max()), limit)
        low = min(int(values.min()), top)
        edges = np.unique(np.linspace(low, top + 1, _BINS + 1).astype(int))
        counts = np.histogram(values, bins=edges)[0].tolist()
        # The last bin of np.histogram includes its right edge, which may be above the limit.
        counts[-1] = int(((values >= edges[-2]) & (values < edges[-1])).sum())
        pairs = itertools.pairwise(edges.tolist())
        labels = [f"{a}-{b - 1}" if b - a > 1 else f"{a}" for a, b in pairs]
        over = int((values > limit).sum())
        return list(zip(labels, counts, strict=True)) + ([(f">{limit}", over)] if over else [])


def bars(bins: Sequence[tuple[str, int]]) -> list[str]:
    """Bins as lines of text."""
    scale = _BAR_WIDTH / max(count for _, count in bins)
    return [
        f"{label:>13} {'█' * max(round(count * scale), count > 0)} {count:,}"
        for label, count in bins
    ]


class Common(NamedTuple):
    """An answer that repeats: as first written, how often it comes, and its share of all."""

    text: str
    count: int
    share: float


class Texts:
    """Takes the records of a data set, and keeps numbers of them only.

    tokenizer: a Hugging Face fast tokenizer; without one nothing is said about lengths.
    """

    def __init__(self, tokenizer=None):
        self._core = None if tokenizer is None else fast_core(tokenizer)
        self._pending: list[str] = []
        self._records, self._turns, self._lengths = array("i"), array("i"), array("i")
        self._answers = array("Q")
        self._letters, self._users = Counter(), Counter()

    def add(self, record: Record) -> None:
        """Takes one record."""
        self._records.append(record.index)
        self._turns.append(len(record.turns) // 2)
        text = MARKS.sub("", "".join(turn.text for turn in record.turns))
        self._letters.update(text)
        self._users.update({script(letter) for letter in set(text)})
        for turn in record.turns[1::2]:
            self._answers.append(digest(_plain(turn.text).encode()))
            self._pending.append(turn.text)
        if len(self._pending) >= _AT_ONCE:
            self._measure()

    def _measure(self) -> None:
        if self._core is not None:
            found = self._core.encode_batch_fast(self._pending, add_special_tokens=False)
            self._lengths.extend(len(encoding.ids) for encoding in found)
        self._pending.clear()

    def distributions(self) -> list[Distribution]:
        """Of tokens an answer and questions a record."""
        self._measure()
        found = [("tokens an answer", self._lengths), ("questions a record", self._turns)]
        return [Distribution(name, np.array(values)) for name, values in found if values]

    def scripts(self) -> list[tuple[str, float, int]]:
        """(writing system, share of all letters, records that have it), the largest first."""
        counts = Counter()
        for letter, count in self._letters.items():
            counts[script(letter)] += count
        del counts[""]
        total = counts.total()
        return [(name, n / total, self._users[name]) for name, n in counts.most_common()]

    def common(self, records) -> list[Common]:
        """The most common answers, of those that come more than once."""
        if not self._answers:
            return []
        answers = np.array(self._answers, np.uint64)
        _, first, counts = np.unique(answers, return_index=True, return_counts=True)
        most = np.lexsort((first, -counts))[:_SHOWN]
        ends, found = np.cumsum(self._turns), []
        for at in most[counts[most] > 1].tolist():
            place = int(np.searchsorted(ends, first[at], side="right"))
            number = int(first[at] - (ends[place - 1] if place else 0))
            record = records[self._records[place]]
            text, count = record.turns[2 * number + 1].text, int(counts[at])
            found.append(Common(text, count, count / len(answers)))
        return found

    def lines(self, records) -> list[str]:
        """The writing systems and the most common answers, as text."""
        lines, shares = (
            [],
            [f"{name} {share:.1%} ({n:,} records)" for name, share, n in self.scripts()],
        )
        more = f" and {len(shares) - _SHOWN} more" if len(shares) > _SHOWN else ""
        if shares:
            lines.append(f"letters: {', '.join(shares[:_SHOWN])}{more}")
        if common := self.common(records):
            different = len(np.unique(np.array(self._answers, np.uint64)))
            lines.append(f"{len(self._answers):,} answers, {different:,} different; most common:")
            lines += [f"{one.count:>10,}  {one.share:6.1%}  {brief(one.text)}" for one in common]
        return lines


def _plain(answer: str) -> str:
    """Yes. and yes are one answer."""
    return answer.strip().rstrip(".").casefold()


_HAN = ("CJK", "KANGXI", "IDEOGRAPHIC")
_PREFIXES = ("FULLWIDTH", "HALFWIDTH", "SMALL", "OLD", "BOLD")


@functools.cache
def script(character: str) -> str:
    """The writing system of a letter, such as Latin or Han, by its name; "" if it is none."""
    if not unicodedata.category(character).startswith("L"):
        return ""
    words = unicodedata.name(character, "").split()
    while words and words[0] in _PREFIXES:
        words = words[1:]
    if not words:
        return "Other"
    return "Han" if words[0] in _HAN else words[0].title()
