"""Single values of Parquet files, against pyarrow, for each way in which files are written."""

import itertools
import os
import random

import pyarrow
import pyarrow.parquet
import pytest

from llava_jax.data import stored
from llava_jax.data.parquet_pages import _PAGES, Leaf, Unsupported, _column, leaves_of
from llava_jax.data.stored import File, Recent
from llava_jax.errors import LlavaError

STRUCT = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
KINDS = {
    "bytes": (pyarrow.binary(), lambda value: value),
    "struct": (STRUCT, lambda value: value and {"bytes": value, "path": "p"}),
    "list": (pyarrow.list_(pyarrow.binary()), None),
    "list of structs": (pyarrow.list_(STRUCT), None),
}


def rows_of(kind: str, rng: random.Random, missing: float, few: bool) -> list:
    words = [rng.randbytes(rng.choice((0, 1, 9, 300))) for _ in range(4)]
    value = lambda: rng.choice(words) if few else rng.randbytes(rng.choice((0, 3, 700)))
    one = lambda: None if rng.random() < missing else value()
    struct = lambda: None if rng.random() < missing else {"bytes": one(), "path": "p"}
    item = struct if "struct" in kind else one
    if "list" not in kind:
        return [item() for _ in range(40)]
    several = lambda: [item() for _ in range(rng.randint(0, 3))]
    return [None if rng.random() < missing else several() for _ in range(40)]


def entries(row, kind: str) -> list:
    items = (row or [None]) if "list" in kind else [row]
    return [item["bytes"] if isinstance(item, dict) else item for item in items]


def check(path, kind: str, rows: list) -> None:
    file = File.of(path)
    leaf = Leaf(file, next(name for name in leaves_of(file) if not name.endswith("path")))
    row = 0
    for group in range(pyarrow.parquet.ParquetFile(path).num_row_groups):
        entry = 0
        for _ in range(pyarrow.parquet.read_metadata(path).row_group(group).num_rows):
            for wanted in entries(rows[row], kind):
                assert leaf.read(group, entry) == wanted
                entry += 1
            row += 1
    assert row == len(rows)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_values_are_those_that_were_written(tmp_path, kind, version):
    rng, cases = random.Random(0), itertools.count()
    for codec, dictionary, missing in itertools.product(
        ["snappy", "none", "zstd", "gzip", "brotli", "lz4"], [True, False], [0, 0.3]
    ):
        path, few = tmp_path / f"{next(cases)}.parquet", rng.random() < 0.5
        rows = rows_of(kind, rng, missing, few)
        pyarrow.parquet.write_table(
            pyarrow.table({"x": pyarrow.array(rows, KINDS[kind][0])}),
            path,
            compression=codec,
            data_page_version=version,
            use_dictionary=dictionary,
            dictionary_pagesize_limit=rng.choice((500, 1 << 20)),  # the rest is written plain
            data_page_size=rng.choice((100, 1 << 20)),
            row_group_size=rng.choice((7, 1000)),
            write_statistics=rng.choice((True, False)),
            write_page_index=rng.choice((True, False)),
        )
        check(path, kind, rows)


def test_other_encodings_are_read_by_pyarrow(tmp_path):
    path, rows = tmp_path / "d.parquet", [b"a", None, b"b" * 100] * 10
    table = pyarrow.table({"x": pyarrow.array(rows, pyarrow.binary())})
    encoding = {"x": "DELTA_LENGTH_BYTE_ARRAY"}
    pyarrow.parquet.write_table(table, path, use_dictionary=False, column_encoding=encoding)
    with pytest.raises(Unsupported):
        _column(Leaf(File.of(path), "x"), 0)
    check(path, "bytes", rows)


@pytest.mark.parametrize("part", ["header", "compressed", "length", "end"])
def test_damage_is_reported_with_its_place(tmp_path, part):
    whole, path = tmp_path / "whole.parquet", tmp_path / "d.parquet"
    rows = [random.Random(i).randbytes(3_000) for i in range(4)]
    codec = "none" if part == "length" else "snappy"
    table = pyarrow.table({"x": rows})
    pyarrow.parquet.write_table(table, whole, use_dictionary=False, compression=codec)
    start = _column(Leaf(File.of(whole), "x"), 0).pages[0].start
    data = bytearray(whole.read_bytes())
    if part == "length":  # of the first value
        start = data.index((3_000).to_bytes(4, "little"))
    if part == "header":
        start = 4
    data[start : start + 4] = b"\xff" * 4
    path.write_bytes(data)
    leaf = Leaf(File.of(path), "x")
    if part == "end":  # lost after the file was opened
        leaf = Leaf(File.of(whole), "x")
        os.truncate(whole, start + 100)
    with pytest.raises(
        LlavaError, match=f"{leaf.file.path.name}, row group 0: the column x is damaged"
    ):
        leaf.read(0, 1)


@pytest.mark.parametrize("codec, version", [("snappy", "1.0"), ("none", "2.0")])
def test_any_damaged_byte_of_a_page_is_reported_or_changes_a_value(tmp_path, codec, version):
    path, rows = tmp_path / "d.parquet", [bytes([65 + i]) * i for i in range(6)]
    options = {"compression": codec, "data_page_version": version}
    pyarrow.parquet.write_table(pyarrow.table({"x": rows}), path, **options)
    column = _column(Leaf(File.of(path), "x"), 0)
    whole, end = path.read_bytes(), column.pages[-1].start + column.pages[-1].stored
    reported = 0
    for place, value in itertools.product(range(4, end), (0, 7, 0xFF)):
        path.write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
        try:
            Leaf(File.of(path), "x").read(0, 5)
        except LlavaError:
            reported += 1
    assert reported > 20


def test_a_file_that_falls_out_of_the_cache_is_still_read(tmp_path, monkeypatch):
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(b"one")
    other.write_bytes(b"two")
    read = os.pread

    def interrupted(number, count, start):  # by threads that read other files
        stored._opened.cache_clear()
        with open(other, "rb"):
            return read(number, count, start)

    monkeypatch.setattr(os, "pread", interrupted)
    assert File.of(one).read(0, 3) == b"one"


def test_pages_in_memory_are_bounded_by_their_bytes(tmp_path):
    rows = [random.Random(i).randbytes(1_000_000) for i in range(4)]
    path = tmp_path / "d.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"x": rows}), path, row_group_size=2)
    leaf = Leaf(File.of(path), "x")
    assert [leaf.read(i // 2, i % 2) for i in (0, 3, 2, 1)] == [rows[i] for i in (0, 3, 2, 1)]
    kept = {key[1:] for key in _PAGES._kept if key[0] == leaf}
    assert kept == {(0, -1), (0, 0), (1, -1), (1, 0)}  # dictionaries hold the values

    recent = Recent(10)
    for key, size in (("a", 4), ("b", 4), ("a", 5), ("c", 5), ("d", 11)):
        recent.keep(key, key.upper(), size)
        if key == "c":
            assert [recent.get(k) for k in "abc"] == ["A", None, "C"]
    assert not any(map(recent.get, "abcd")) and recent._size == 0
