"""What all collections of records have in common: parsing, pickling, what is said of them."""

import dataclasses
import functools
import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable

from llava_jax.data.chunks import Census, Chunk
from llava_jax.data.forms import check_columns
from llava_jax.data.parsing import Record, parse_record
from llava_jax.errors import LlavaError, RecordError


class Collection(ABC):
    """A picklable sequence of records with random access, parsed but not checked.

    Attributes:
      path: of the file or folder.
    """

    path: str

    @abstractmethod
    def __len__(self) -> int:
        """The number of records."""

    @abstractmethod
    def __getitem__(self, index: int) -> Record:
        """A record. Raises RecordError."""

    @abstractmethod
    def chunks(self) -> list[Chunk]:
        """All records, one chunk after the other."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of all records and of how they are read."""

    @property
    @abstractmethod
    def image_roots(self) -> set[str]:
        """Every folder that paths start from."""

    @property
    @abstractmethod
    def sources(self) -> list[tuple[str, str]]:
        """What a line about a form says before it and behind the count, for each data set."""

    @functools.cached_property
    def census(self) -> Census:
        """What the records are like. Measuring, which reads all of them, sets it."""
        census = Census.none()
        for chunk in self.chunks():
            for index in chunk.numbers:
                try:
                    census.add(self[index], chunk.source)
                except RecordError:  # reported when the record is read
                    pass
        return census

    def ignored_keys(self) -> dict[str, int]:
        """key that nothing reads -> number of records with it; most frequent first."""
        return dict(self.census.ignored.most_common())

    def forms(self) -> list[str]:
        """A line about each form of conversation that was recognised."""
        counts = sorted(self.census.forms.items(), key=lambda entry: (entry[0][0], -entry[1]))
        lines = []
        for (source, form), count in counts:
            before, behind = self.sources[source]
            lines.append(f"{before}{form} ({count:,} records{behind})")
        return lines


class Records(Collection):
    """The records of one data set.

    Workers make it anew from the arguments it was made with.

    Attributes:
      image_root: the folder that paths of images and videos start from.
      columns: our names of keys -> those of the data; see `forms.check_columns`.
      pairs: see `parse_record`.
    """

    pairs = False

    def __init__(self, path, image_root, columns=None, **more):
        self.path, self.columns = str(path), check_columns(columns or {})
        self.image_root = None if image_root is None else str(image_root)
        self._arguments = {
            "path": self.path, "image_root": self.image_root, "columns": self.columns, **more
        }  # fmt: skip

    @abstractmethod
    def item(self, index: int) -> dict:
        """A record as it is stored; pictures may be `Stored`. Raises RecordError."""

    @abstractmethod
    def stored_chunks(self) -> list[Chunk]:
        """The chunks, by what is stored."""

    @abstractmethod
    def content(self) -> str:
        """A hash of all that the data hold, in hex; moving or copying them does not change it."""

    @property
    def image_roots(self) -> set[str]:
        return {self.image_root} - {None}

    @property
    def sources(self) -> list[tuple[str, str]]:
        return [("", "")]

    def chunks(self) -> list[Chunk]:
        how = json.dumps([self.columns, self.pairs], sort_keys=True)
        return [c._replace(content=f"{c.content} {how}") for c in self.stored_chunks()]

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(index)
        index = int(index)
        origin = self.origin(index)
        try:
            record = self._parsed(self.item(index), index)
        except RecordError as error:
            if not origin:
                raise
            raise RecordError(error.kind, f"{origin}: {error}") from None
        unread = self.unread(index)
        if not origin and not unread:
            return record
        ignored = (*record.ignored_keys, *unread)
        return dataclasses.replace(record, origin=origin, ignored_keys=ignored)

    def _parsed(self, item: dict, index: int) -> Record:
        return parse_record(item, index, self.image_root, self.columns, self.pairs)

    def origin(self, index: int) -> str:
        """Where a record is stored, where its number does not say it."""
        return ""

    def unread(self, index: int) -> tuple[str, ...]:
        """Keys that are stored with a record, but are not part of its item: nothing reads them."""
        return ()

    def __getstate__(self):
        return self._arguments, self.pairs

    def __setstate__(self, state):
        arguments, pairs = state
        self.__init__(**arguments)
        self.pairs = pairs

    def fingerprint(self) -> str:
        """The content, and how it is read where that is not the usual way."""
        if not self.columns:
            return self.content()
        named = json.dumps(self.columns, sort_keys=True)
        return hashlib.sha256(f"{self.content()} {named}".encode()).hexdigest()

    def check_named(self, keys: Iterable[str] | None = None) -> None:
        """LlavaError if `columns` names a key that no record has.

        keys: those of the data, without which records are read until all names are found.
        """
        missing = {theirs: ours for ours, theirs in self.columns.items()}
        found = set()
        for some in self._keys() if keys is None else [keys]:
            if not missing:
                return
            found.update(some)
            missing = {theirs: ours for theirs, ours in missing.items() if theirs not in found}
        for theirs, ours in missing.items():
            known = ", ".join(sorted(map(str, found))[:20])
            raise LlavaError(
                f"{self.path}: config.data.columns.{ours} is {theirs!r}, which no record has; "
                f"its keys: {known}"
            )

    def _keys(self):
        for index in range(len(self)):
            try:
                item = self.item(index)
            except RecordError:  # reported when the record is read
                continue
            if isinstance(item, dict):
                yield item


def ends_of_files(files: list[os.PathLike], begin: str = "") -> str:
    """SHA-256 over the name, the size and both ends of each file, in hex."""
    digest = hashlib.sha256(begin.encode())
    for path in files:
        size = os.stat(path).st_size
        digest.update(f"{os.path.basename(path)} {size}".encode())
        with open(path, "rb") as file:
            digest.update(file.read(1 << 20))
            file.seek(max(0, size - (1 << 20)))
            digest.update(file.read())
    return digest.hexdigest()


def state_of_files(files: list[os.PathLike]) -> str:
    """Changes when the size or the time of modification of a file does."""
    digest = hashlib.sha256()
    for path in files:
        status = os.stat(path)
        digest.update(f"{status.st_size} {status.st_mtime_ns}\0".encode())
    return digest.hexdigest()
