"""Parquet files of the Hugging Face hub: their rows, and the pictures stored inside.

pyarrow comes with tensorflow-datasets. Pictures are read when they are needed: a set of documents
holds gigabytes of them.
"""

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
        cell = _column(self.path, self.group, self.column)[self.row].as_py()
        if self.item is not None:
            cell = cell[self.item]
        data = cell.get("bytes") if isinstance(cell, Mapping) else cell
        if not isinstance(data, bytes):
            raise LlavaError(f"{self.name}: the file holds no picture there")
        return data

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
        if column not in _columns(self.path):
            raise KeyError(column)
        return StoredPicture(self.path, column, self.group, self.row, item)

    def pictures(self, column: str) -> tuple[StoredPicture, ...]:
        """The pictures of a column of lists."""
        if column not in _columns(self.path):
            raise KeyError(column)
        count = _list_lengths(self.path, self.group, column)[self.row]
        return tuple(self.picture(column, item) for item in range(count))


def rows(paths: Sequence[Path], columns: Iterable[str]) -> Iterator[ParquetRow]:
    """The rows of several files, one after the other, with those of `columns` that a file has.

    LlavaError if a file cannot be read.
    """
    import pyarrow
    import pyarrow.parquet

    for path in paths:
        try:
            file = pyarrow.parquet.ParquetFile(path)
            present = [name for name in columns if name in file.schema_arrow.names]
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, columns=present)
                for row, values in enumerate(table.to_pylist()):
                    yield ParquetRow(values, path, group, row)
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise LlavaError(f"cannot read {path}: {error}") from None


def _column(path: Path, group: int, column: str):
    """One column of one row group; `column` may be the path of a leaf, a.list.element.b."""
    import pyarrow
    import pyarrow.parquet

    columns = _read_columns(path, group)
    if column not in columns:
        try:
            file = pyarrow.parquet.ParquetFile(path)
            columns[column] = file.read_row_group(group, columns=[column]).column(0)
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise LlavaError(f"cannot read {path}: {error}") from None
    return columns[column]


@functools.lru_cache(maxsize=2)  # questions are asked in the order of the file
def _read_columns(path: Path, group: int) -> dict:
    """The columns of a row group that were read, to be filled."""
    return {}


@functools.lru_cache(maxsize=256)
def _columns(path: Path) -> frozenset[str]:
    import pyarrow.parquet

    return frozenset(pyarrow.parquet.read_schema(path).names)


@functools.lru_cache(maxsize=256)
def _list_lengths(path: Path, group: int, column: str) -> list[int]:
    """The number of pictures in each row; of a stored picture only the file name is read."""
    import pyarrow.compute
    import pyarrow.parquet

    schema = pyarrow.parquet.ParquetFile(path).schema
    leaves = [schema.column(i).path for i in range(len(schema.names))]
    named = [leaf for leaf in leaves if leaf.startswith(f"{column}.") and leaf.endswith(".path")]
    lists = _column(path, group, (named or [column])[0])
    return pyarrow.compute.list_value_length(lists).to_pylist()
