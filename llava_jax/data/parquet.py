"""Columns of Parquet files: texts as they are, pictures by where they are stored.

pyarrow comes with tensorflow-datasets. A picture column has paths, encoded bytes, structs of both
(as Hugging Face `datasets` writes them), or lists of one of these. Of a struct the paths alone are
read to know which rows have how many pictures, and the statistics of the file say whether their
bytes are stored too.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llava_jax.data.parquet_pages import Leaf, leaves_of, metadata
from llava_jax.data.stored import File, Stored
from llava_jax.errors import LlavaError

_BATCH = 64  # rows in memory, of a column of pictures that has to be read whole


@dataclass(frozen=True)
class StoredValue(Stored):
    """One picture in a column of a Parquet file.

    Attributes:
      leaf: the column of its bytes.
      group, entry: the row group, and the picture's entry in the column there.
      row: of the file, from 0.
      given: the path that it had before, "" if that is not known.
    """

    leaf: Leaf
    group: int
    entry: int
    row: int
    given: str = ""

    @property
    def name(self) -> str:
        column = self.leaf.name.partition(".")[0]
        where = f"{column} in row {self.row} of {self.leaf.file.path.name}"
        return f"{self.given} ({where})" if self.given else where

    def read(self) -> bytes:
        data = self.leaf.read(self.group, self.entry)
        if data is None:
            path = self.leaf.file.path
            raise LlavaError(f"{path}, row {self.row}: the file holds no picture there")
        return data


class Pictures:
    """The pictures of a column of a Parquet file, by row.

    Attributes:
      is_list: whether a row has a list of them.
    """

    def __init__(self, source: File, column: str):
        file = metadata(source)
        kind = file.schema_arrow.field(column).type
        self.is_list = is_list(kind)
        element = kind.value_type if self.is_list else kind
        leaves = [
            leaf for leaf in leaves_of(source) if leaf == column or leaf.startswith(f"{column}.")
        ]
        fields = {field.name for field in element} if _is_struct(element) else set()
        ending = lambda name: next(leaf for leaf in leaves if leaf.endswith(f".{name}"))
        self._leaf = Leaf(source, ending("bytes") if "bytes" in fields else leaves[0])
        self._number = leaves_of(source).index(self._leaf.name)
        if not self.is_list and "path" not in fields and _is_full(file, self._number):
            every = np.ones(file.metadata.num_rows, np.int64)
            shape = _Shape(every, every > 0, every > 0, None)
        else:
            leaf = ending("path") if "path" in fields else self._leaf.name
            shape = _read_shape(file, leaf, self.is_list)
        self._names = shape.names
        self._counts, self._valid = shape.counts, shape.valid
        self._first = np.concatenate([[0], np.cumsum(self._counts)])  # picture of each row
        rows = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
        self._groups = np.concatenate([[0], np.cumsum(rows)])  # first row of each group
        entries = np.maximum(self._counts, 1) if self.is_list else np.ones_like(self._counts)
        self._entries = np.concatenate([[0], np.cumsum(entries)])  # first entry of each row
        self._inside = shape.leaf_valid
        if "bytes" not in fields and fields:
            self._inside = np.zeros_like(self._valid)
        elif "path" in fields:
            for group in range(len(rows)):
                self._look_inside(group, file)

    def _look_inside(self, group: int, file) -> None:
        """Which pictures of a row group are stored, and not only their paths."""
        rows = self._groups[group], self._groups[group + 1]
        here = slice(self._first[rows[0]], self._first[rows[1]])
        chunk, valid = file.metadata.row_group(group).column(self._number), self._valid[here]
        statistics = chunk.statistics if chunk.is_stats_set else None
        if statistics is not None and statistics.has_null_count:
            stored = chunk.num_values - statistics.null_count
            if stored in (0, valid.sum()):
                self._inside[here] = valid & bool(stored)
                return
        self._inside[here] = _read_shape(file, self._leaf.name, self.is_list, [group]).leaf_valid

    def __getitem__(self, row: int) -> list[Stored | str | None]:
        """The pictures of a row: where each is stored, or its path; None for a missing one."""
        found = []
        group = int(np.searchsorted(self._groups, row, side="right")) - 1
        start = int(self._entries[row] - self._entries[self._groups[group]])
        for item in range(self._counts[row]):
            number = int(self._first[row]) + item
            name = self._names[number].as_py() if self._names is not None else None
            if self._inside[number]:
                found.append(StoredValue(self._leaf, group, start + item, row, name or ""))
            else:
                found.append(name)
        return found


class _Shape(NamedTuple):
    """How many pictures each row has, from one leaf of their column.

    counts: int64 [rows]. valid: bool [pictures], which are there. leaf_valid: which have a value in
    the leaf. names: the values, of a leaf of text.
    """

    counts: np.ndarray
    valid: np.ndarray
    leaf_valid: np.ndarray
    names: Any


def _is_full(file, number: int) -> bool:
    """Whether the statistics of a leaf say that no value is missing."""
    chunks = [file.metadata.row_group(g).column(number) for g in range(file.num_row_groups)]
    return all(
        chunk.is_stats_set and chunk.statistics.has_null_count and not chunk.statistics.null_count
        for chunk in chunks
    )


def _read_shape(file, leaf: str, is_list: bool, groups: Iterable[int] | None = None) -> _Shape:
    import pyarrow
    import pyarrow.compute

    counts, valid, leaf_valid, names = [], [], [], []
    groups = range(file.num_row_groups) if groups is None else groups
    for batch in file.iter_batches(_BATCH, groups, [leaf]):
        values = batch.column(0)
        if is_list:
            lengths = pyarrow.compute.list_value_length(values).fill_null(0)
            counts.append(lengths.to_numpy(zero_copy_only=False))
            values = pyarrow.compute.list_flatten(values)
        else:
            here = values.is_valid().to_numpy(zero_copy_only=False)
            counts.append(here.astype(np.int64))
            values = values.filter(pyarrow.array(here))
        valid.append(values.is_valid().to_numpy(zero_copy_only=False))
        if _is_struct(values.type):
            values = pyarrow.compute.struct_field(values, 0)
        leaf_valid.append(values.is_valid().to_numpy(zero_copy_only=False))
        if not _is_binary(values.type):
            names.append(values)
    return _Shape(
        np.concatenate([np.zeros(0, np.int64), *counts]),
        np.concatenate([np.zeros(0, bool), *valid]),
        np.concatenate([np.zeros(0, bool), *leaf_valid]),
        pyarrow.chunked_array(names).combine_chunks() if names else None,
    )


def holds_pictures(kind) -> bool:
    """Whether a column of a pyarrow type may hold pictures that are not plain paths."""
    element = kind.value_type if is_list(kind) else kind
    if _is_struct(element):
        names = {field.name for field in element}
        return bool(names) and names <= {"bytes", "path"}
    return _is_binary(element)


def is_list(kind) -> bool:
    """Whether a pyarrow type is one of lists."""
    from pyarrow import types

    return types.is_list(kind) or types.is_large_list(kind)


def _is_struct(kind) -> bool:
    from pyarrow import types

    return types.is_struct(kind)


def _is_binary(kind) -> bool:
    from pyarrow import types

    return types.is_binary(kind) or types.is_large_binary(kind)


@functools.lru_cache(maxsize=256)
def pictures_of(file: File, column: str) -> Pictures:
    """The pictures of a column; LlavaError if the file cannot be read."""
    with reading(file.path):
        return Pictures(file, column)


class reading:
    """A block in which what pyarrow finds wrong with a file is a LlavaError naming it."""

    def __init__(self, path: Path):
        self._path = path

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        import pyarrow

        if isinstance(error, LlavaError):
            return
        if isinstance(error, OSError | ValueError | LookupError | pyarrow.ArrowException):
            raise LlavaError(f"cannot read {self._path}: {error}") from None
