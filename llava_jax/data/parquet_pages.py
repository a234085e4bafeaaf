"""One value of a Parquet file, such as a picture, without the row group around it.

A row group often holds 100 MB, and pyarrow reads a column of it whole. Its pages hold about one
megabyte each, so of a picture only the page is read. A column of a row group is stored as

    header page | header page | ...          a header says how many entries its page has

and a page, once it is decompressed, as the levels of its entries, which say where a value is
missing, and the values that are there:

    rows            [a.png]  None  [b.png, c.png]  []
    entries            0      1       2      3      4       an empty list has an entry too
    their levels       3      0       3      3      1       3 of 3: there is a value
    values             a              b      c

The format: https://parquet.apache.org/docs/file-format. Encodings that are not read here, which
are rare for pictures, are read by pyarrow, the row group as a whole.
"""

import dataclasses
import functools
import struct
from bisect import bisect_right
from typing import NamedTuple

import numpy as np

from llava_jax.data.stored import File, Recent
from llava_jax.errors import LlavaError

_DATA, _DICTIONARY, _DATA_V2 = 0, 2, 3  # types of pages
_PLAIN, _PLAIN_DICTIONARY, _RLE_DICTIONARY = 0, 2, 8  # encodings of values
_RLE = 3  # the encoding of levels
_CODECS = {"SNAPPY": "snappy", "GZIP": "gzip", "ZSTD": "zstd", "BROTLI": "brotli"}
_MAX_HEADER = 1 << 20
# Bytes of decompressed pages in memory: neighbours are often read one after the other, and a page,
# above all of a dictionary, may hold all pictures of a row group.
_PAGES = Recent(256 << 20)
# What damaged bytes, taken for numbers and lengths, lead to.
_DAMAGE = (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError,
           MemoryError, SystemError, RecursionError, struct.error)  # fmt: skip


class Unsupported(Exception):
    """Pages that only pyarrow reads."""


class _Page(NamedTuple):
    """Where a page is and how it is stored; `first` is its first entry, or -1 of a dictionary."""

    first: int
    start: int
    stored: int
    size: int
    entries: int
    encoding: int
    levels: tuple[int, int] | None  # bytes of both kinds of levels, which version 2 keeps apart
    compressed: bool


class _Column(NamedTuple):
    """The pages of a column of a row group, its dictionary page first if it has one."""

    dictionary: _Page | None
    pages: list[_Page]
    codec: str | None
    definition: int  # the level of an entry with a value
    repetition: int


class _Values(NamedTuple):
    """A page: values `buffer[starts[i] : ends[i]]`, and the number of each entry's value, or -1.

    buffer: None stands for that of the dictionary.
    """

    buffer: bytes | None
    starts: list[int]
    ends: list[int]
    numbers: np.ndarray


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A column of bytes or text in a Parquet file.

    name: its path in the schema, such as `images.list.element.bytes`.
    """

    file: File
    name: str

    def read(self, group: int, entry: int) -> bytes | None:
        """The value at an entry of a row group; None where there is none.

        Raises:
          LlavaError: the file cannot be read, or is damaged there.
        """
        import pyarrow

        try:
            try:
                column = _column(self, group)
                page = column.pages[bisect_right(column.pages, entry, key=lambda p: p.first) - 1]
                values = _values(self, group, page.first)
                number = int(values.numbers[entry - page.first])
                if number < 0:
                    return None
                start, end = values.starts[number], values.ends[number]
                words = _values(self, group, -1) if values.buffer is None else values
                return words.buffer[start:end]
            except Unsupported:
                return _whole_group(self, group)[entry].as_py()
        except LlavaError:  # it is gone, or another one
            raise
        except (*_DAMAGE, pyarrow.ArrowException) as error:
            reason = str(error) or type(error).__name__
            raise LlavaError(
                f"{self.file.path}, row group {group}: the column {self.name} is damaged at entry "
                f"{entry}: {reason}; get the file again"
            ) from None


@functools.lru_cache(maxsize=256)
def metadata(file: File):
    """The pyarrow.parquet.ParquetFile of a file; LlavaError if it is none."""
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(file.path)
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise LlavaError(f"cannot read {file.path}: {error}") from None


def leaves_of(file: File) -> list[str]:
    """The names of all leaf columns of a file."""
    schema = metadata(file).schema
    return [schema.column(number).path for number in range(len(schema.names))]


@functools.lru_cache(maxsize=1 << 16)
def _column(leaf: Leaf, group: int) -> _Column:
    """The headers of all pages of a leaf in a row group."""
    file, number = metadata(leaf.file), leaves_of(leaf.file).index(leaf.name)
    chunk, kind = file.metadata.row_group(group).column(number), file.schema.column(number)
    if chunk.compression != "UNCOMPRESSED" and chunk.compression not in _CODECS:
        raise Unsupported
    start = chunk.data_page_offset
    if chunk.has_dictionary_page and chunk.dictionary_page_offset:
        start = min(start, chunk.dictionary_page_offset)
    end, first, dictionary, pages = start + chunk.total_compressed_size, 0, None, []
    while first < chunk.num_values and start < end:
        header, start = _header(leaf.file, start, end)
        kind_of_page, stored = header[1], header[3]
        if stored < 0:
            raise ValueError("a page of less than no bytes")
        at = {_DATA: 5, _DICTIONARY: 7, _DATA_V2: 8}.get(kind_of_page)
        if at is not None:
            of_kind, levels = header[at], None
            if kind_of_page == _DATA_V2:
                levels = of_kind.get(6, 0), of_kind.get(5, 0)
            elif kind_of_page == _DATA and {of_kind[3], of_kind[4]} != {_RLE}:
                raise Unsupported
            entries, encoding = of_kind[1], of_kind[4 if levels else 2]
            is_dictionary = kind_of_page == _DICTIONARY
            known = (_PLAIN, _PLAIN_DICTIONARY) + (() if is_dictionary else (_RLE_DICTIONARY,))
            if encoding not in known:
                raise Unsupported
            page = _Page(
                -1 if is_dictionary else first, start, stored, header[2], entries, encoding,
                levels, of_kind.get(7, True) if levels else True,
            )  # fmt: skip
            if is_dictionary:
                dictionary = page
            else:
                pages.append(page)
                first += entries
        start += stored
    if first != chunk.num_values:
        raise ValueError(f"its pages hold {first:,} of {chunk.num_values:,} entries")
    codec = _CODECS.get(chunk.compression)
    return _Column(dictionary, pages, codec, kind.max_definition_level, kind.max_repetition_level)


def _header(file: File, start: int, end: int) -> tuple[dict, int]:
    """The header of the page at a byte of the file, and where the page itself begins."""
    size = 256
    while True:
        data = file.read(start, min(size, end - start))
        try:
            header, length = _thrift(data, 0)
            return header, start + length
        except IndexError:
            if size >= min(_MAX_HEADER, end - start):
                raise ValueError("a page has no header") from None
            size *= 8


def _content(leaf: Leaf, column: _Column, page: _Page) -> tuple[bytes, bytes, bytes]:
    """(definition levels, the page's other levels, values) of a page, decompressed."""
    import pyarrow

    data = leaf.file.read(page.start, page.stored)
    unpacked = lambda data, size: (
        pyarrow.decompress(data, size, column.codec, asbytes=True)
        if column.codec and page.compressed and size
        else data
    )
    if page.levels is not None:
        repetition, definition = page.levels
        levels = repetition + definition
        values = unpacked(data[levels:], page.size - levels)
        return data[repetition:levels], data[:repetition], values
    data, parts = unpacked(data, page.size), []
    for level in (column.repetition, column.definition):
        length = struct.unpack_from("<I", data)[0] if level and page.first >= 0 else None
        parts.append(b"" if length is None else data[4 : 4 + length])
        data = data if length is None else data[4 + length :]
    return parts[1], parts[0], data


def _values(leaf: Leaf, group: int, first: int) -> _Values:
    """The page that begins with an entry, or with -1 the dictionary."""
    key = leaf, group, first
    if (values := _PAGES.get(key)) is None:
        values = _read_values(leaf, group, first)
        _PAGES.keep(key, values, len(values.buffer or b"") + 100 * len(values.numbers))
    return values


def _read_values(leaf: Leaf, group: int, first: int) -> _Values:
    column = _column(leaf, group)
    if first < 0:
        _, _, data = _content(leaf, column, column.dictionary)
        starts, ends = _plain(data, column.dictionary.entries)
        return _Values(data, starts, ends, np.arange(len(starts)))
    page = next(page for page in column.pages if page.first == first)
    levels, _, data = _content(leaf, column, page)
    numbers = np.arange(page.entries)
    if column.definition:
        width = column.definition.bit_length()
        present = _hybrid(levels, width, page.entries) == column.definition
        numbers = np.where(present, np.cumsum(present) - 1, -1)
    count = int(numbers.max(initial=-1)) + 1
    if page.encoding == _PLAIN:
        starts, ends = _plain(data, count)
        return _Values(data, starts, ends, numbers)
    words = _values(leaf, group, -1)
    chosen = _hybrid(data[1:], data[0], count).tolist() if count else []
    starts, ends = [words.starts[i] for i in chosen], [words.ends[i] for i in chosen]
    return _Values(None, starts, ends, numbers)


def _plain(data: bytes, count: int) -> tuple[list[int], list[int]]:
    """Where values begin and end, each of which has its length before it."""
    starts, ends, place = [], [], 0
    for _ in range(count):
        start = place + 4
        place = start + struct.unpack_from("<I", data, place)[0]
        starts.append(start)
        ends.append(place)
    if place > len(data):
        raise ValueError("a value is longer than its page")
    return starts, ends


def _hybrid(data: bytes, width: int, count: int) -> np.ndarray:
    """int64 [count] from runs of one number, and of numbers packed in `width` bits each."""
    if not width:
        return np.zeros(count, np.int64)
    found, got, place = [], 0, 0
    while got < count:
        head, place = _varint(data, place)
        if head & 1:
            number = (head >> 1) * 8
            packed = np.frombuffer(
                data, np.uint8, min((head >> 1) * width, len(data) - place), place
            )
            bits = np.unpackbits(packed, bitorder="little")
            bits = bits[: len(bits) // width * width].reshape(-1, width).astype(np.int64)
            run = bits @ (1 << np.arange(width, dtype=np.int64))
            place += (head >> 1) * width
        else:
            number = head >> 1
            size = (width + 7) // 8
            run = np.full(min(number, count), int.from_bytes(data[place : place + size], "little"))
            place += size
        found.append(run)
        got += len(run)
        if not len(run):
            raise ValueError("an empty run of levels")
    return np.concatenate(found)[:count] if found else np.zeros(0, np.int64)


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """An unsigned number of Thrift or Parquet, and the place after it."""
    number = shift = 0
    while True:
        byte = data[place]
        number |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return number, place


def _thrift(data: bytes, place: int) -> tuple[dict, int]:
    """A struct of Thrift's compact protocol -> {number of field: value}, and the place after it.

    Raises:
      IndexError: the struct goes on behind the data.
    """
    fields, field = {}, 0
    while head := data[place]:
        place += 1
        if head >> 4:
            field += head >> 4
        else:
            field, place = _varint(data, place)
            field = field >> 1 ^ -(field & 1)
        fields[field], place = _thrift_value(data, place, head & 15)
    return fields, place + 1


def _thrift_value(data: bytes, place: int, kind: int):
    if kind in (1, 2):
        return kind == 1, place
    if kind == 3:
        return data[place], place + 1
    if kind in (4, 5, 6):
        number, place = _varint(data, place)
        return number >> 1 ^ -(number & 1), place
    if kind == 7:
        return None, place + 8
    if kind == 8:
        length, place = _varint(data, place)
        data[place + length]  # IndexError: a field, or the end of the struct, has to follow
        return None, place + length
    if kind == 12:
        return _thrift(data, place)
    raise ValueError(f"a header with a field of kind {kind}")


@functools.lru_cache(maxsize=2)
def _whole_group(leaf: Leaf, group: int):
    """All entries of a leaf in a row group, read by pyarrow."""
    table = metadata(leaf.file).read_row_group(group, columns=[leaf.name])
    column = table.column(0).combine_chunks()
    return _entries(column)


def _entries(column):
    """Lists and structs around a leaf are taken away; a missing or empty list becomes a null."""
    import pyarrow

    while True:
        if pyarrow.types.is_struct(column.type):
            column = column.flatten()[0]
        elif pyarrow.types.is_list(column.type) or pyarrow.types.is_large_list(column.type):
            lists = column.to_pylist()
            flat = [value for values in lists for value in (values or [None])]
            column = pyarrow.array(flat, column.type.value_type)
        else:
            return column
