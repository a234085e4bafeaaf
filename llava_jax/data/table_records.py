"""The records of Parquet files, as on the Hugging Face hub, and of Arrow files.

Columns are named like the keys of a JSON record, or by `columns`. Texts of Parquet files are copied
to a file that can be mapped, where there is a folder for it, and are in memory otherwise. Pictures
stay in the files until they are needed.
"""

import bisect
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from llava_jax.data import arrow
from llava_jax.data.attachments import IMAGE_KEYS, VIDEO_KEYS
from llava_jax.data.chunks import Chunk, spans
from llava_jax.data.collection import Records, ends_of_files, state_of_files
from llava_jax.data.forms import ANSWER, LISTS, QUESTION
from llava_jax.data.pairs import PAIR_KEYS
from llava_jax.data.parquet import holds_pictures, pictures_of
from llava_jax.data.parquet_pages import metadata
from llava_jax.data.parsing import PLAIN_KEYS, SYSTEM_KEYS, UNSUPPORTED_KEYS
from llava_jax.data.record_boxes import BOX_KEYS
from llava_jax.data.stored import File
from llava_jax.errors import LlavaError, RecordError

_TEXTS = ("id", *LISTS, QUESTION, ANSWER, *PAIR_KEYS, *SYSTEM_KEYS, *BOX_KEYS)


class _File:
    """One file: its texts, its pictures, the names of columns that nothing reads."""

    def __init__(self, path: Path, columns: dict[str, str], cache_dir):
        self.path, file = path, File.of(path)
        ours = {theirs: name for name, theirs in columns.items()}
        texts, self._pictures, self.unread = [], {}, []
        is_arrow = path.suffix == ".arrow"
        schema = arrow.table_of(file).schema if is_arrow else metadata(file).schema_arrow
        self.names = schema.names
        if twice := [name for name, count in Counter(self.names).items() if count > 1]:
            raise LlavaError(f"{path} has two columns {twice[0]!r}: write it anew with one")
        for field in schema:
            name = ours.get(field.name, field.name)
            if name in UNSUPPORTED_KEYS:
                raise LlavaError(
                    f"{path} has a column {field.name!r}: only images and videos are supported"
                )
            if name in (*IMAGE_KEYS, *VIDEO_KEYS) and holds_pictures(field.type):
                of = arrow.Pictures if is_arrow else pictures_of
                self._pictures[field.name] = of(file, field.name)
            elif name in (*IMAGE_KEYS, *VIDEO_KEYS, *_TEXTS):
                texts.append(field.name)
            elif name not in PLAIN_KEYS:
                self.unread.append(field.name)
        if is_arrow:
            self._texts, self.rows = arrow.table_of(file).select(texts), len(arrow.table_of(file))
            return
        self._texts = arrow.parquet_texts(file, texts, cache_dir)
        self.rows = metadata(file).metadata.num_rows

    def item(self, row: int) -> dict[str, Any]:
        item = {name: self._texts.column(name)[row].as_py() for name in self._texts.column_names}
        for name, pictures in self._pictures.items():
            found = pictures[row]
            item[name] = found if pictures.is_list else next(iter(found), None)
        return item


class TableRecords(Records):
    """The rows of files, one file after the other."""

    def __init__(self, path, image_root, columns=None, files: list[Path] = (), cache_dir=None):
        super().__init__(path, image_root, columns, files=files, cache_dir=cache_dir)
        self._files = [_File(file, self.columns, cache_dir) for file in files]
        self._ends = np.cumsum([file.rows for file in self._files]).tolist()
        self.check_named({name for file in self._files for name in file.names})
        for file in self._files:
            if not {*LISTS, ANSWER, "rejected", *self.columns.values()} & {*file.names}:
                raise LlavaError(
                    f"{file.path} holds no conversations: its columns are "
                    f"{', '.join(file.names)}; name a question and an answer, as in "
                    "config.data.columns=\"{'question': 'Q', 'answer': 'A'}\""
                )

    def __len__(self) -> int:
        return self._ends[-1]

    def item(self, index: int) -> dict:
        file, row = self._place(index)
        try:
            return file.item(row)
        except ValueError as error:  # text that is not UTF-8
            raise RecordError("bad text", f"record {index}: {error}") from None

    def origin(self, index: int) -> str:
        file, row = self._place(index)
        return f"row {row} of {file.path.name}" if len(self._files) > 1 else ""

    def _place(self, index: int) -> tuple[_File, int]:
        number = bisect.bisect_right(self._ends, index)
        return self._files[number], index - (self._ends[number - 1] if number else 0)

    def content(self) -> str:
        """SHA-256 over the name, size and both ends of each file; their ends describe them."""
        return ends_of_files([file.path for file in self._files], "parquet 1")

    def stored_chunks(self) -> list[Chunk]:
        found, first = [], 0
        for file in self._files:
            content, state = ends_of_files([file.path]), state_of_files([file.path])
            for start, stop in spans(file.rows):
                rows = f"{content} {start} {stop}"
                found.append(Chunk(first + start, first + stop, rows, state))
            first += file.rows
        return found

    def unread(self, index: int) -> tuple[str, ...]:
        return tuple(self._place(index)[0].unread)

    @property
    def sources(self) -> list[tuple[str, str]]:
        kind = self._files[0].path.suffix[1:].capitalize()
        return [("", f" in {len(self._files)} {kind} file{'s' * (len(self._files) > 1)}")]
