"""Chunks of records, which are measured and kept together, and what a scan of records counts."""

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

SIZE = 4096  # records; with another one older indices of tars and JSON files mean nothing


class Chunk(NamedTuple):
    """Consecutive records.

    start, stop: their numbers. content: a hash of what they hold, which stays the same when records
    are added behind them. within: the state of the file that may hold their pictures; "" where each
    picture has a file of its own, or the data set cannot change. source: see `Census`.
    """

    start: int
    stop: int
    content: str
    within: str = ""
    source: int = 0

    @property
    def numbers(self) -> range:
        """Those of its records."""
        return range(self.start, self.stop)


def spans(count: int) -> Iterator[tuple[int, int]]:
    """The ranges of chunks of so many records: (0, SIZE), (SIZE, 2 * SIZE), ... (..., count)."""
    for start in range(0, count, SIZE):
        yield start, min(start + SIZE, count)


class Census(NamedTuple):
    """Counts of records.

    forms: by (number of the data set in a mixture, form of conversation). ignored: by key that
    nothing reads.
    """

    forms: Counter
    ignored: Counter

    @classmethod
    def none(cls) -> "Census":
        """Of no records."""
        return cls(Counter(), Counter())

    def add(self, record, source: int = 0) -> None:
        """Counts a record."""
        self.forms[source, record.form] += 1
        self.ignored.update(record.ignored_keys)

    def merge(self, other: "Census", source: int) -> None:
        """Adds the counts of other records, all of them of one data set."""
        for (_, form), count in other.forms.items():
            self.forms[source, form] += count
        self.ignored.update(other.ignored)
