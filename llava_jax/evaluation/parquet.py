"""Parquet files of the Hugging Face hub: their rows, and the pictures stored inside.

Pictures are read when they are needed: a set of documents holds gigabytes of them.
"""

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_jax.data.parquet import holds_pictures, pictures_of, reading
from llava_jax.data.parquet_pages import metadata
from llava_jax.data.stored import File, Stored
from llava_jax.errors import LlavaError


@dataclass(frozen=True)
class StoredPicture:
    """One picture in a column of a Parquet file.

    Attributes:
      group, row: the row group of the file, and the row in it.
      item: its number in a cell that holds a list of pictures.
    """

    path: Path
    column: str
    group: int
    row: int
    item: int | None = None

    def read(self) -> bytes:
        """The encoded picture."""
        cell = _cell(self.path, self.column, self.group, self.row)
        found = cell[self.item or 0] if len(cell) > (self.item or 0) else None
        if not isinstance(found, Stored):
            raise LlavaError(f"{self.name}: the file holds no picture there")
        return found.read()

    @property
    def name(self) -> str:
        """Where it is stored; pictures of one cell have the same name."""
        return f"{self.path.name}, group {self.group}, row {self.row}, {self.column}"


@dataclass(frozen=True)
class ParquetRow:
    """One row: the values of its columns but for pictures, which are read on demand."""

    values: Mapping[str, Any]
    path: Path
    group: int
    row: int

    def __getitem__(self, column: str) -> Any:
        return self.values[column]

    def get(self, column: str, default: Any = None) -> Any:
        return self.values.get(column, default)

    def picture(self, column: str, item: int | None = None) -> StoredPicture:
        if column not in _columns(File.of(self.path)):
            raise KeyError(column)
        return StoredPicture(self.path, column, self.group, self.row, item)

    def pictures(self, column: str) -> tuple[StoredPicture, ...]:
        """The pictures of a column of lists."""
        if column not in _columns(File.of(self.path)):
            raise KeyError(column)
        count = len(_cell(self.path, column, self.group, self.row))
        return tuple(self.picture(column, item) for item in range(count))


def rows(paths: Sequence[Path], columns: Iterable[str]) -> Iterator[ParquetRow]:
    """The rows of several files, one after the other, with those of `columns` that a file has.

    LlavaError if a file cannot be read.
    """
    for path in paths:
        file = metadata(File.of(path))
        present = [name for name in columns if name in file.schema_arrow.names]
        with reading(path):
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, columns=present)
                for row, values in enumerate(table.to_pylist()):
                    yield ParquetRow(values, path, group, row)


def _cell(path: Path, column: str, group: int, row: int) -> list[Stored | str | None]:
    """The pictures of one cell; none if the column holds no pictures."""
    file = File.of(path)
    if not holds_pictures(metadata(file).schema_arrow.field(column).type):
        return []
    return pictures_of(file, column)[_first_rows(file)[group] + row]


@functools.lru_cache(maxsize=256)
def _first_rows(file: File) -> list[int]:
    """The first row of each row group."""
    parts = metadata(file).metadata
    firsts = [0]
    for group in range(parts.num_row_groups):
        firsts.append(firsts[-1] + parts.row_group(group).num_rows)
    return firsts


@functools.lru_cache(maxsize=256)
def _columns(file: File) -> frozenset[str]:
    return frozenset(metadata(file).schema_arrow.names)
