"""Parquet and Arrow files: every layout gives the batches of the JSON and its picture files."""

import json
import pickle
import shutil
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from llava_jax import cli
from llava_jax.data import build, parquet
from llava_jax.data.parquet_pages import Leaf
from llava_jax.data.pipeline import TrainingData
from llava_jax.data.records import about, checked_record, ignored_keys_text, open_records
from llava_jax.data.shards import is_there
from llava_jax.data.stored import Stored
from llava_jax.data.validate import validate
from llava_jax.errors import LlavaError, RecordError
from tests.data import same_records as same
from tests.data.test_forms import assert_same, batches
from tests.data.test_tiles import FORMAT
from tests.tiny_model import byte_tokenizer


@pytest.fixture
def items(tmp_path):
    return same.originals(tmp_path)


def wanted(tmp_path, items):
    return batches(open_records(same.write_json(tmp_path / "d.json", items), tmp_path))


def with_pictures(tmp_path, items, key="images", **options):
    """The records with their pictures as structs."""
    without = [{k: v for k, v in item.items() if k != "image"} for item in items]
    return [
        item | {key: same.as_structs(tmp_path, original, **options)}
        for item, original in zip(without, items, strict=True)
    ]


LAYOUTS = {
    "structs of bytes": lambda root, items: with_pictures(root, items),
    "structs of paths": lambda root, items: with_pictures(root, items, with_bytes=False),
    "structs of bytes alone": lambda root, items: [
        row | {"images": [{"bytes": image["bytes"]} for image in row["images"]]}
        for row in with_pictures(root, items)
    ],
    "structs of paths alone": lambda root, items: [
        row | {"images": [{"path": image["path"]} for image in row["images"]]}
        for row in with_pictures(root, items)
    ],
    "bytes": lambda root, items: [
        item | {"image": [(root / name).read_bytes() for name in item["image"] or ()]}
        for item in items
    ],
    "paths": lambda root, items: items,
    "JSON text": lambda root, items: [
        item | {"conversations": json.dumps(item["conversations"])} for item in items
    ],
    "lists of each key": lambda root, items: [
        item | {"conversations": {key: [turn[key] for turn in item["conversations"]]
                                  for key in ("from", "value")}}
        for item in items
    ],
    "parts": lambda root, items: [
        {k: v for k, v in same.messages(item, lambda name: {"type": "image"}).items()
         if k != "image"} | {"images": same.as_structs(root, item)}
        for item in items
    ],
    "texts": lambda root, items: [
        same.in_texts(item) for item in with_pictures(root, items)
    ],
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("group", [1, 5, 100])
def test_layouts_of_the_same_records_give_the_same_batches(tmp_path, items, layout, group):
    path = same.write_parquet(tmp_path / "d.parquet", LAYOUTS[layout](tmp_path, items), group)
    records = pickle.loads(pickle.dumps(open_records(path, tmp_path)))
    assert_same(batches(records), wanted(tmp_path, items))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_in_arrow_files(tmp_path, items, layout):
    table = pyarrow.Table.from_pylist(LAYOUTS[layout](tmp_path, items))
    folder = tmp_path / "saved/train"
    folder.mkdir(parents=True)
    for number in range(2):  # as `datasets` does: a stream in each
        path = folder / f"data-{number:05}-of-00002.arrow"
        part = table.slice(number * 5, 5 if number == 0 else None)
        with pyarrow.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(part, max_chunksize=3)
    (folder / "dataset_info.json").write_text("{}")
    records = pickle.loads(pickle.dumps(open_records(tmp_path / "saved", tmp_path)))
    assert_same(batches(records), wanted(tmp_path, items))
    assert "(12 records in 2 Arrow files)" in about(records)[0]
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(LlavaError, match="cannot read .*data-00001-of-00002.arrow"):
        open_records(tmp_path / "saved", tmp_path)


def test_one_picture_a_row_may_be_missing_or_a_path(tmp_path, items):
    singles = [item for item in items if len(item["image"] or ()) < 2]
    rows = with_pictures(tmp_path, singles, "image")
    for i, row in enumerate(rows):
        row["image"] = next(iter(row["image"]), None)
        if row["image"] and i % 2:
            row["image"]["bytes"] = None
    assert rows[3]["image"] is None
    rows[3]["image"] = {"bytes": None, "path": None}
    path = same.write_parquet(tmp_path / "d.parquet", rows)
    records = open_records(path)
    assert_same(batches(records), wanted(tmp_path, singles))
    kinds = [type(records[i].images[0]).__name__ for i in (1, 2)]
    assert kinds == ["str", "StoredValue"]


def test_no_picture_is_read_before_it_is_needed(tmp_path, items, monkeypatch):
    path = same.write_parquet(tmp_path / "d.parquet", with_pictures(tmp_path, items))
    read = []
    monkeypatch.setattr(Leaf, "read", lambda *args: read.append(args))
    records = open_records(path)
    found = [checked_record(records, i) for i in range(len(records))]
    about(records), ignored_keys_text(records), records.fingerprint()
    assert not read and sum(len(record.images) for record in found) == 13
    assert all(isinstance(image, Stored) for record in found for image in record.images)
    assert len(pickle.dumps(found[1].images[0])) < 1000
    assert found[1].image_names == ("a/1.png (images in row 1 of d.parquet)",)


def folder_of(tmp_path, items, files: dict) -> Path:
    folder, rows = tmp_path / "set", with_pictures(tmp_path, items)
    for name, chosen in files.items():
        same.write_parquet(folder / name, [rows[i] for i in chosen])
    return folder


@pytest.mark.parametrize(
    "files",
    [
        {"data/train-00000-of-00002.parquet": range(5), "data/test-00000-of-00001.parquet": [5],
         "data/train-00001-of-00002.parquet": range(5, 12)},
        {"train/0000.parquet": range(7), "train/0001.parquet": range(7, 12), "dev/0.parquet": [1]},
        {"my-train.parquet": range(12), "my-validation.parquet": [2]},
        {"0.parquet": range(3), "1.parquet": range(3, 12), "test.parquet": [2]},
    ],
)  # fmt: skip
def test_a_folder_has_splits(tmp_path, items, files):
    folder = folder_of(tmp_path, items, files)
    records = open_records(folder)
    assert_same(batches(records), wanted(tmp_path, items))
    other = next(s for s in ("validation", "test") if s in str(files) or s == "validation"
                 and "dev" in str(files))  # fmt: skip
    assert len(open_records(folder, split=other)) == 1
    with pytest.raises(LlavaError, match=f"set has no split 'dav'; it has: .*{other}.*"):
        open_records(folder, split="dav")


def test_files_that_are_missing_are_noticed(tmp_path, items):
    files = {"train-00000-of-00003.parquet": range(5), "train-00002-of-00003.parquet": range(5, 12)}
    folder = folder_of(tmp_path, items, files)
    with pytest.raises(LlavaError, match="train-00000-of-00003.* there are 2, not 3"):
        open_records(folder)
    twice = folder / "train-00000-of-00003-0123456789abcdef.parquet"
    shutil.copy(folder / "train-00000-of-00003.parquet", twice)
    with pytest.raises(LlavaError, match=r"there are the numbers '?\[0, 0, 2\]'?: get the rest"):
        open_records(folder)
    twice.unlink()
    records = open_records(folder / "train-*.parquet")
    assert_same(batches(records), wanted(tmp_path, items))
    braces = open_records(f"{folder}/train-{{00000,00002}}-of-00003.parquet")
    assert len(braces) == 12
    assert is_there(f"{folder}/train-{{00000,00002}}-of-00003.parquet") and is_there(folder)
    assert not is_there(f"{folder}/train-{{00000..00002}}-of-00003.parquet")
    with pytest.raises(LlavaError, match="no data file at .*train-00001-of-00003"):
        open_records(f"{folder}/train-{{00000..00002}}-of-00003.parquet")


def test_several_data_sets_in_a_folder_are_named(tmp_path, items):
    folder = folder_of(tmp_path, items, {"ai2d/train.parquet": [0], "chart/train.parquet": [1]})
    with pytest.raises(LlavaError, match="several data sets; name one: .*/ai2d, .*/chart"):
        open_records(folder)
    assert len(open_records(folder / "ai2d")) == 1


def test_faults_name_the_file_and_the_row(tmp_path, items):
    items[7]["conversations"][1]["from"] = "robot"
    folder = folder_of(tmp_path, items, {"0.parquet": range(5), "1.parquet": range(5, 12)})
    records = open_records(folder)
    with pytest.raises(RecordError, match=r"set: row 2 of 1.parquet: record 7 \(id 'r7'\), turn 1"):
        checked_record(records, 7)
    items[7]["conversations"][1]["from"] = "gpt"
    rows = with_pictures(tmp_path, items)
    rows[7]["images"][0]["bytes"] = b"broken"
    same.write_parquet(folder / "1.parquet", rows[5:])
    report = validate(open_records(folder), FORMAT, byte_tokenizer(), progress=False)
    (fault,) = report.faults["not an image"]
    assert "record 7 (id 'r7', row 2 of 1.parquet)" in fault and "images in row 2" in fault


def test_a_broken_file_is_named(tmp_path, items):
    path = same.write_parquet(tmp_path / "d.parquet", items)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(LlavaError, match="cannot read .*d.parquet"):
        open_records(path)


def test_columns_of_one_name_are_refused(tmp_path):
    table = pyarrow.table([["a"], ["b"], ["c"]], names=["question", "answer", "answer"])
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
    with pytest.raises(LlavaError, match="d.parquet has two columns 'answer'"):
        open_records(tmp_path / "d.parquet")


def test_damage_of_a_page_is_a_fault_of_its_records(tmp_path, items):
    rows = with_pictures(tmp_path, items)
    path = same.write_parquet(tmp_path / "d.parquet", rows, compression="none")
    data = path.read_bytes()
    place = data.index(rows[1]["images"][0]["bytes"]) - 4  # its length
    path.write_bytes(data[:place] + b"\xff\xff\xff\x7f" + data[place + 4 :])
    records = open_records(path)
    report = validate(records, FORMAT, byte_tokenizer(), progress=False)
    text = report.text()
    assert "record 1 (id 'r1')" in text and "d.parquet, row group 0: the column images" in text
    assert {*report.faults} == {"unreadable image"}
    options = {"batch_size": 1, "epochs": 1, "progress": False}
    with pytest.raises(LlavaError, match="d.parquet, row group 0.* is damaged at entry"):
        TrainingData(records, byte_tokenizer(), FORMAT, **options)
    options |= {"bad_image": "skip", "bad_image_ceiling": 5}
    data = TrainingData(records, byte_tokenizer(), FORMAT, **options)
    assert 1 in data.refused["bad image"] and {*range(5, 12)} <= {*data.usable}


def test_a_picture_lost_during_a_run_is_reported_with_its_record(tmp_path, items, monkeypatch):
    path = same.write_parquet(tmp_path / "d.parquet", with_pictures(tmp_path, items))
    options = {"batch_size": 1, "epochs": 1, "progress": False, "workers": 0}
    data = TrainingData(open_records(path), byte_tokenizer(), FORMAT, **options)

    def lost(*args):
        raise LlavaError("d.parquet was changed")

    monkeypatch.setattr(Leaf, "read", lost)
    with pytest.raises(
        LlavaError, match=r"record \d+ \(id 'r\d+'\): cannot read image 'a/.*changed"
    ):
        [*data.batch_iterator()]
    with pytest.raises(LlavaError, match=r"record 0 \(id 'r0'\): d.parquet was changed"):
        build.build_data_set(path, None, tmp_path / "sets", "mine", progress=False)


def test_plain_bytes_are_counted_by_the_statistics(tmp_path, items, monkeypatch):
    png = (tmp_path / "a/1.png").read_bytes()
    rows = [{"image": png + bytes([i]), "question": "What?", "answer": "x"} for i in range(7)]
    path = same.write_parquet(tmp_path / "d.parquet", rows, group=3)
    monkeypatch.setattr(parquet, "_read_shape", lambda *args: pytest.fail("pictures are read"))
    records = open_records(path)
    assert [records[i].images[0].read() for i in range(7)] == [row["image"] for row in rows]
    monkeypatch.undo()
    rows[4]["image"] = None
    path = same.write_parquet(tmp_path / "e.parquet", rows, group=3)
    assert [len(open_records(path)[i].images) for i in range(7)] == [1, 1, 1, 1, 0, 1, 1]


def test_columns_that_hold_no_conversation_are_listed(tmp_path):
    path = same.write_parquet(tmp_path / "d.parquet", [{"query": "a", "label": "b", "extra": 1}])
    with pytest.raises(LlavaError, match="no conversations: its columns are query, label, ex"):
        open_records(path)
    records = open_records(path, columns={"question": "query", "answer": "label"})
    assert [turn.text for turn in checked_record(records, 0).turns] == ["a", "b"]
    assert ignored_keys_text(records) == "ignored keys: extra (1 record)"
    assert about(records) == ["read as question and answer (1 records in 1 Parquet file)"]


def test_what_was_measured_is_used_again_until_the_file_changes(tmp_path, items, monkeypatch):
    path = same.write_parquet(tmp_path / "d.parquet", with_pictures(tmp_path, items))
    first = batches(open_records(path), cache_dir=tmp_path / "cache")
    read, whole = [], Leaf.read
    monkeypatch.setattr(Leaf, "read", lambda *args: read.append(args) or whole(*args))
    options = {"batch_size": 1, "epochs": 1, "progress": False, "cache_dir": tmp_path / "cache"}
    data = TrainingData(open_records(path), byte_tokenizer(), FORMAT, **options)
    assert not read and data.steps == len(first)
    shutil.copy(path, tmp_path / "moved.parquet")
    moved = open_records(tmp_path / "moved.parquet")
    TrainingData(moved, byte_tokenizer(), FORMAT, **options)  # its pictures are looked at again
    assert len(read) == 13


def test_a_data_set_can_be_built_of_it(tmp_path, items):
    path = same.write_parquet(tmp_path / "d.parquet", with_pictures(tmp_path, items))
    built = build.build_data_set(path, None, tmp_path / "sets", "mine", progress=False)
    assert_same(batches(open_records(built)), wanted(tmp_path, items))


def test_a_data_set_is_built_with_columns(tmp_path):
    path = same.write_parquet(tmp_path / "d.parquet", [{"query": "What?", "label": "A cat."}])
    command = ["build", str(path), "--out", str(tmp_path / "sets"), "--name", "mine"]
    assert cli.main(command) == 1
    assert cli.main([*command, "--columns", "question=query", "answer=label"]) == 0
    record = checked_record(open_records(tmp_path / "sets/mine"), 0)
    assert [turn.text for turn in record.turns] == ["What?", "A cat."]


def test_workers_read_it_too(tmp_path, items):
    path = same.write_parquet(tmp_path / "d.parquet", with_pictures(tmp_path, items))
    assert_same(batches(open_records(path), workers=1), wanted(tmp_path, items))
