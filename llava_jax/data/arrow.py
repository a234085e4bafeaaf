"""Arrow files: mapped, not read. `save_to_disk` of Hugging Face `datasets` writes some, others are
ours, made of larger files once.
"""

import functools
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llava_jax.data.parquet import is_list, reading
from llava_jax.data.parquet_pages import metadata
from llava_jax.data.stored import File, Stored
from llava_jax.errors import LlavaError
from llava_jax.files import whole_file

_BATCH = 1 << 14  # rows copied at a time


@functools.lru_cache(maxsize=4096)  # small: what is mapped is not in memory
def table_of(file: File):
    """The table of a file; LlavaError if it is none."""
    import pyarrow

    try:
        with pyarrow.memory_map(str(file.path)) as source:
            if source.read(6) == b"ARROW1":
                return pyarrow.ipc.open_file(source).read_all()
            source.seek(0)
            return pyarrow.ipc.open_stream(source).read_all()
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise LlavaError(f"cannot read {file.path}: {error}") from None


@dataclass(frozen=True)
class StoredCell(Stored):
    """One picture in a column of an Arrow file.

    Attributes:
      item: its number in a cell that holds a list.
      given: the path that it had before, "" if that is not known.
    """

    file: File
    column: str
    row: int
    item: int | None = None
    given: str = ""

    @property
    def name(self) -> str:
        where = f"{self.column} in row {self.row} of {self.file.path.name}"
        return f"{self.given} ({where})" if self.given else where

    def read(self) -> bytes:
        if File.of(self.file.path) != self.file:
            raise LlavaError(f"{self.file.path} was changed after it was opened first")
        cell = table_of(self.file).column(self.column)[self.row]
        cell = cell if self.item is None else cell.values[self.item]
        cell = cell["bytes"] if isinstance(cell, Mapping) else cell
        return cell.as_py()


class Pictures:
    """The pictures of a column of an Arrow file, by row; see `parquet.Pictures`."""

    def __init__(self, file: File, column: str):
        self._file, self._column = file, column
        self._cells = table_of(file).column(column)
        self.is_list = is_list(self._cells.type)

    def __getitem__(self, row: int) -> list[Stored | str | None]:
        cell = self._cells[row]
        if not cell.is_valid:
            return []
        if not self.is_list:
            return [self._one(cell, row, None)]
        return [self._one(cell.values[item], row, item) for item in range(len(cell.values))]

    def _one(self, cell, row: int, item: int | None) -> Stored | str | None:
        given = None
        if isinstance(cell, Mapping):
            given = cell["path"].as_py() if "path" in cell.type.names else None
            has_bytes = cell.is_valid and "bytes" in cell.type.names and cell["bytes"].is_valid
        else:
            has_bytes = cell.is_valid
        return StoredCell(self._file, self._column, row, item, given or "") if has_bytes else given


def mapped(place: Path, state: bytes):
    """The table of one of our files; None if it is absent, broken, or made of another state."""
    import pyarrow

    try:
        with pyarrow.memory_map(str(place)) as source:
            table = pyarrow.ipc.open_file(source).read_all()
        return table if table.schema.metadata[b"state"] == state else None
    except (OSError, KeyError, TypeError, pyarrow.ArrowException):
        return None


def parquet_texts(file: File, columns: list[str], cache_dir: str | os.PathLike | None):
    """Columns of a Parquet file as a table.

    cache_dir: where a copy of them is kept and mapped, checked by the file's size and time of
    modification; None: they are in memory.
    """
    import pyarrow

    with reading(file.path):
        source = metadata(file)
        if cache_dir is None or not columns:
            return source.read(columns=columns)
        name = f"{os.path.abspath(file.path)} {columns}".encode(errors="surrogateescape")
        place = Path(cache_dir) / f"texts-{hashlib.sha256(name).hexdigest()[:32]}.arrow"
        state = f"1 {file.size} {file.modified}"
        if (table := mapped(place, state.encode())) is not None:
            return table
        fields = [source.schema_arrow.field(column) for column in columns]
        schema = pyarrow.schema(fields, {"state": state})
        place.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(place) as out, pyarrow.ipc.new_file(out, schema) as writer:
            for batch in source.iter_batches(_BATCH, columns=columns):
                writer.write_batch(batch.select(columns))
        return mapped(place, state.encode())
