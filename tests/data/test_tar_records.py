"""Tars of samples: every layout gives the batches of the JSON and its picture files."""

import json
import os
import pickle
import tarfile

import pytest

from llava_jax.data import build, tar_index
from llava_jax.data.pipeline import TrainingData
from llava_jax.data.records import about, checked_record, ignored_keys_text, open_records
from llava_jax.data.tar_records import StoredMember
from llava_jax.data.validate import validate
from llava_jax.data.video import Video
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


def sample(root, item, keep_names=False, record=None, text_first=False):
    """(key, members) of a record; two pictures are 0.png and 1.png."""
    names = item["image"] or []
    extensions = ["png"] if len(names) == 1 else [f"{i}.png" for i in range(len(names))]
    pictures = {e: (root / name).read_bytes() for e, name in zip(extensions, names, strict=True)}
    record = record or {k: v for k, v in item.items() if k != "id" and (k != "image" or keep_names)}
    text = {"json": json.dumps(record, ensure_ascii=False).encode()}
    return item["id"], text | pictures if text_first else pictures | text


LAYOUTS = {
    "conversations": lambda root, item: sample(root, item),
    "the record comes first": lambda root, item: sample(root, item, text_first=True),
    "names of files": lambda root, item: sample(root, item, keep_names=True),
    "a list of turns": lambda root, item: sample(root, item, record=item["conversations"]),
    "messages": lambda root, item: sample(
        root, item, record=same.messages(item, lambda name: {"type": "image"}) | {"image": None}
    ),
    "texts": lambda root, item: sample(root, item, record={"texts": same.in_texts(item)["texts"]}),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_the_same_records_give_the_same_batches(tmp_path, items, layout):
    samples = [LAYOUTS[layout](tmp_path, item) for item in items]
    path = same.write_tar(tmp_path / "d.tar", samples)
    records = pickle.loads(pickle.dumps(open_records(path)))
    assert_same(batches(records), wanted(tmp_path, items))


def test_several_tars_are_named_by_a_pattern_or_a_folder(tmp_path, items):
    samples, truth = [sample(tmp_path, item) for item in items], wanted(tmp_path, items)
    for number in range(3):
        some = samples[number * 4 : number * 4 + 4]
        same.write_tar(tmp_path / f"set/train-{number:03}.tar", some)
    same.write_tar(tmp_path / "set/val-000.tar", samples[:1])
    for path in ("set", "set/train-{000..002}.tar", "set/train-*.tar"):
        assert_same(batches(open_records(tmp_path / path)), truth)
    assert len(open_records(tmp_path / "set", split="validation")) == 1
    with pytest.raises(LlavaError, match="no data file at .*train-003.tar"):
        open_records(f"{tmp_path}/set/train-{{000..003}}.tar")


def test_members_of_a_sample_may_be_apart(tmp_path, items):
    samples = [sample(tmp_path, item) for item in items]
    apart = [(key, {e: d}) for e in ("json", "png", "0.png", "1.png") for key, members in samples
             for d in [members.get(e)] if d is not None]  # fmt: skip
    records = open_records(same.write_tar(tmp_path / "d.tar", apart))
    assert_same(batches(records), wanted(tmp_path, items))


def test_pictures_are_in_natural_order_unless_the_record_orders_them(tmp_path, items):
    data = (tmp_path / "a/1.png").read_bytes()
    pictures = {f"{i}.png": data for i in sorted(range(11), key=str)}
    talk = [{"from": "human", "value": "<image>" * 11}, {"from": "gpt", "value": "x"}]
    record = {"conversations": talk}
    text = lambda **more: {"json": json.dumps(record | more).encode()}
    order = [f"x/7.{i}.png" for i in (10, 3, 0, 1, 2, 4, 5, 6, 7, 8, 9)]
    samples = [("x/7", pictures | text()), ("x/8", pictures | text(images=[f"{i}.png" for i in
               (10, *range(10))])), ("x/9", pictures | text(image=[o.replace("7", "9", 1) for o in
               order]))]  # fmt: skip
    records = open_records(same.write_tar(tmp_path / "d.tar", samples))
    numbers = lambda i: [int(image.member.split(".")[1]) for image in records[i].images]
    assert numbers(0) == [*range(11)]
    assert numbers(1) == [10, *range(10)]
    assert numbers(2)[:3] == [10, 3, 0]


def test_captions_and_classes(tmp_path, items):
    data = (tmp_path / "a/1.png").read_bytes()
    meta = json.dumps({"url": "https://a", "caption": "A cat."}).encode()
    members = {"jpg": data, "txt": b"A cat.\n", "cls": b"3", "npy": b"?", "json": meta}
    path = same.write_tar(tmp_path / "d.tar", [("000", members), ("001", members)])
    records = open_records(path)
    record = checked_record(records, 0)
    assert [turn.text for turn in record.turns] == ["<image>", "A cat."] and record.id == "000"
    assert about(records) == ["read as captions (2 records in 1 tar)"]
    assert records.ignored_keys() == dict.fromkeys(("npy", "cls", "url", "caption"), 2)
    named = open_records(path, columns={"question": "txt", "answer": "cls"})
    assert [turn.text for turn in checked_record(named, 1).turns] == ["<image>\nA cat.", "3"]
    with pytest.raises(LlavaError, match="columns.answer is 'label', which no record has"):
        open_records(path, columns={"answer": "label"})


def test_a_caption_is_read_where_a_record_has_no_conversation(tmp_path, items):
    data = (tmp_path / "a/1.png").read_bytes()
    samples = [sample(tmp_path, items[1]), ("c", {"png": data, "txt": b"A cat."})] * 60
    samples = [(f"{i}", members) for i, (_, members) in enumerate(samples)]
    samples[-2][1]["txt"] = b"not used"
    path = same.write_tar(tmp_path / "d.tar", samples)
    for columns in ({}, {"id": "id"}):
        records = open_records(path, columns=columns)
        assert checked_record(records, 118).turns[1].text == "It is 1."
        assert [turn.text for turn in checked_record(records, 1).turns] == ["<image>", "A cat."]
    assert about(records)[0].count("(60 records in 1 tar)") == 2
    assert records.ignored_keys() == {"txt": 60}


def test_videos(tmp_path):
    talk = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "x"}]
    members = {"mp4": b"...", "json": json.dumps({"conversations": talk}).encode()}
    record = checked_record(open_records(same.write_tar(tmp_path / "d.tar", [("0", members)])), 0)
    (video,) = record.images
    assert isinstance(video, Video) and video.source.read() == b"..."
    assert record.image_names == ("0.mp4 of d.tar",)


def test_the_index_is_made_once_and_anew_for_another_tar(tmp_path, items, monkeypatch):
    samples, cache = [sample(tmp_path, item) for item in items], tmp_path / "run/cache"
    path = same.write_tar(tmp_path / "d.tar", samples)
    first = open_records(path, cache_dir=cache)
    (index,) = cache.iterdir()
    monkeypatch.setattr(tar_index, "_samples", lambda file: pytest.fail("read again"))
    again = open_records(path, cache_dir=cache)
    assert (
        again.fingerprint() == first.fingerprint() and len(pickle.loads(pickle.dumps(again))) == 12
    )
    monkeypatch.undo()
    whole = index.read_bytes()
    for broken in (b"", whole[: len(whole) // 2], b"x" * len(whole)):
        index.write_bytes(broken)
        assert len(open_records(path, cache_dir=cache)) == 12
        assert index.read_bytes() == whole
    same.write_tar(path, samples[:5])
    assert len(open_records(path, cache_dir=cache)) == 5


def test_training_looks_at_pictures_again_only_if_a_tar_changed(tmp_path, items, monkeypatch):
    path = same.write_tar(tmp_path / "d.tar", [sample(tmp_path, item) for item in items])
    read, whole = [], StoredMember.read
    monkeypatch.setattr(StoredMember, "read", lambda self: read.append(self) or whole(self))
    options = {"batch_size": 1, "epochs": 1, "progress": False, "cache_dir": tmp_path / "cache"}
    look = lambda: TrainingData(open_records(path), byte_tokenizer(), FORMAT, **options)
    look()
    look()
    assert len(read) == 13
    os.utime(path, ns=(1, 1))
    look()
    assert len(read) == 26


def test_faults_name_the_tar_and_the_sample(tmp_path, items):
    samples = [sample(tmp_path, item) for item in items]
    samples[2][1]["png"] = b"broken"
    samples[3][1]["json"] = b'{"conversations": ['
    samples[5][1]["json"] = b"5"
    path = same.write_tar(tmp_path / "d.tar", samples)
    records = open_records(path, columns={"id": "id"})
    report = validate(records, FORMAT, byte_tokenizer(), progress=False)
    assert "conversations of from and value (10 records in 1 tar)" in about(records)[0]
    faults = [message for messages in report.faults.values() for message in messages]
    assert any("record 2 (id 'r2', r2 of d.tar): 'r2.png of d.tar' is not an image" in m
               for m in faults)  # fmt: skip
    assert any("r3 of d.tar: record 3: r3.json: Expecting value" in m for m in faults)
    assert any("r5 of d.tar: record 5: r5.json holds 5" in m for m in faults)
    samples[1][1]["json"] = json.dumps({"image": ["a", "b"], "conversations": []}).encode()
    path = same.write_tar(tmp_path / "e.tar", samples)
    with pytest.raises(RecordError, match="names 2 files, 'a, b', but its sample holds 1: 'png'"):
        checked_record(open_records(path), 1)


def test_broken_tars_are_named(tmp_path, items):
    path = same.write_tar(tmp_path / "d.tar", [sample(tmp_path, item) for item in items])
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.index(b"IEND") - 10])
    with pytest.raises(LlavaError, match="d.tar is cut off: 'r|cannot read .*d.tar: unexp"):
        open_records(path)
    path.write_bytes(b"no tar" * 1000)
    with pytest.raises(LlavaError, match="cannot read .*d.tar: "):
        open_records(path)
    with tarfile.open(path, "w:gz") as tar:
        tar.add(tmp_path / "a/1.png", "1.png")
    with pytest.raises(LlavaError, match="d.tar: it is compressed"):
        open_records(path)
    (tmp_path / "d.tar.gz").write_bytes(b"")
    with pytest.raises(LlavaError, match="tars that are not compressed"):
        open_records(tmp_path / "d.tar.gz")
    path.write_bytes(whole[:-10_240] + b"x" * 10_240)
    with pytest.raises(LlavaError, match="d.tar is no tar from byte [0-9,]+ on: it is damaged"):
        open_records(path)
    middle = whole.index(b"r5.json")
    path.write_bytes(whole[:middle] + b"\xff" * 500 + whole[middle + 500 :])
    with pytest.raises(LlavaError, match="d.tar is no tar from byte [0-9,]+ on"):
        open_records(path)
    path.write_bytes(whole + whole)
    with pytest.raises(LlavaError, match="is no tar from byte .*or another tar begins"):
        open_records(path)
    path.write_bytes(whole[:middle])
    with pytest.raises(LlavaError, match="d.tar is cut off at byte"):
        open_records(path)
    with tarfile.open(path, "w", errors="surrogateescape") as tar:
        tar.addfile(tarfile.TarInfo("a\udcff.json"))
    with pytest.raises(LlavaError, match=r"the name 'a\\udcff.json' is not UTF-8"):
        open_records(path)
    data = {"png": b"1"}
    same.write_tar(path, [("1", data), ("1", data)])
    with pytest.raises(LlavaError, match="d.tar has two members '1.png'"):
        open_records(path)
    same.write_tar(path, [])
    with pytest.raises(LlavaError, match="d.tar holds no files of samples"):
        open_records(path)


def test_a_tar_that_changes_during_a_run_is_noticed(tmp_path, items):
    path = same.write_tar(tmp_path / "d.tar", [sample(tmp_path, item) for item in items])
    image = open_records(path)[1].images[0]
    os.truncate(path, 100)
    with pytest.raises(LlavaError, match="d.tar: cannot read 'r1.png': the file"):
        image.read()


def test_a_data_set_can_be_built_of_it(tmp_path, items):
    path = same.write_tar(tmp_path / "d.tar", [sample(tmp_path, item) for item in items])
    built = build.build_data_set(path, None, tmp_path / "sets", "mine", progress=False)
    assert_same(batches(open_records(built)), wanted(tmp_path, items))


def test_workers_read_it_too(tmp_path, items):
    path = same.write_tar(tmp_path / "d.tar", [sample(tmp_path, item) for item in items])
    assert_same(batches(open_records(path), workers=1), wanted(tmp_path, items))


def test_keys_that_nothing_reads(tmp_path, items):
    members = sample(tmp_path, items[1])[1] | {"npy": b"1", "note.txt": b"x"}
    records = open_records(same.write_tar(tmp_path / "d.tar", [("0", members)]))
    text = ignored_keys_text(records)
    assert "npy (1 record)" in text and "note.txt (1 record)" in text
