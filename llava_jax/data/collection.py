"""What all collections of records have in common: parsing, pickling, what is said of them."""

import dataclasses
import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator

from llava_jax.data.forms import check_columns, talk_form
from llava_jax.data.pairs import pair_form
from llava_jax.data.parsing import Record, count_ignored_keys, parse_record
from llava_jax.data.record_boxes import has_boxes
from llava_jax.errors import LlavaError, RecordError


class Records(ABC):
    """A picklable sequence of records with random access, parsed but not checked.

    Workers make it anew from the arguments it was made with.

    Attributes:
      path: of the file or folder.
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
    def __len__(self) -> int:
        """The number of records."""

    @abstractmethod
    def item(self, index: int) -> dict:
        """A record as it is stored; pictures may be `Stored`. Raises RecordError."""

    @abstractmethod
    def content(self) -> str:
        """A hash of all that the data hold, in hex; moving or copying them does not change it."""

    @property
    def image_roots(self) -> set[str]:
        """Every folder that paths start from."""
        return {self.image_root} - {None}

    @property
    def within(self) -> str | None:
        """The state of the files that may hold pictures; None where each has a file of its own."""
        return None

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(index)
        origin = self.origin(int(index))
        try:
            record = self._parsed(self.item(int(index)), int(index))
        except RecordError as error:
            if not origin:
                raise
            raise RecordError(error.kind, f"{origin}: {error}") from None
        return dataclasses.replace(record, origin=origin) if origin else record

    def _parsed(self, item: dict, index: int) -> Record:
        return parse_record(item, index, self.image_root, self.columns, self.pairs)

    def origin(self, index: int) -> str:
        """Where a record is stored, where its number does not say it."""
        return ""

    def __getstate__(self):
        return self._arguments, self.pairs

    def __setstate__(self, state):
        arguments, pairs = state
        self.__init__(**arguments)
        self.pairs = pairs

    def items(self) -> Iterator:
        """All records as they are stored; None for one that cannot be read, as reading it says."""
        for index in range(len(self)):
            try:
                yield self.item(index)
            except RecordError:
                yield None

    def fingerprint(self) -> str:
        """The content, and how it is read where that is not the usual way."""
        if not self.columns:
            return self.content()
        named = json.dumps(self.columns, sort_keys=True)
        return hashlib.sha256(f"{self.content()} {named}".encode()).hexdigest()

    @property
    def holds_boxes(self) -> bool:
        """Whether a record may have boxes."""
        return any(isinstance(item, dict) and has_boxes(item) for item in self.items())

    def ignored_keys(self) -> dict[str, int]:
        """key that nothing reads -> number of records with it."""
        return count_ignored_keys(self.items(), self.columns, self.pairs)

    def forms(self) -> list[str]:
        """A line about each form of conversation that was recognised."""
        counts = Counter(map(self._form_of, self.items()))
        counts.pop(None, None)
        return [f"{form} ({count:,} records)" for form, count in counts.most_common()]

    def _form_of(self, item) -> str | None:
        return (pair_form if self.pairs else talk_form)(item, self.columns)

    def check_named(self, keys) -> None:
        """LlavaError if `columns` names a key that is not among those of the data."""
        for ours, theirs in self.columns.items():
            if theirs not in keys:
                found = ", ".join(sorted(map(str, keys))[:20])
                raise LlavaError(
                    f"{self.path}: config.data.columns.{ours} is {theirs!r}, which no record has; "
                    f"its keys: {found}"
                )


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
