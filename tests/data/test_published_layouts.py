"""Layouts of published data sets in miniature, and files of the programs that write them."""

import io
import json

import pytest

from llava_jax.data.records import about, checked_record, open_records
from llava_jax.errors import LlavaError
from tests.data import same_records as same
from tests.tiny_model import random_image


@pytest.fixture
def png(tmp_path):
    file = io.BytesIO()
    random_image(0).save(file, "PNG")
    for name in ("sam/images/sa_1.png", "coco/train2017/1.png", "chart/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(file.getvalue())
    return file.getvalue()


def turns(question="<image>\nWhat?", answer="A cat."):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def read(records) -> list[tuple]:
    """(id, question, answer, number of pictures) of each record."""
    found = [checked_record(records, i) for i in range(len(records))]
    return [(r.id, *(turn.text for turn in r.turns), len(r.images)) for r in found]


def test_llava_onevision_data(tmp_path, png):
    struct = {"bytes": png, "path": "1.png"}
    rows = [
        {"id": "ai2d_1", "image": struct, "conversations": turns(), "data_source": "ai2d"},
        {"id": "magpie_2", "image": None, "conversations": turns("Hi?"), "data_source": "magpie"},
    ]
    for name in ("ai2d(gpt4v)", "magpie_pro(l3_80b_mt)"):
        same.write_parquet(tmp_path / f"data/{name}/train-00000-of-00001.parquet", rows)
    (tmp_path / "data/README.md").write_text("configs: ...")
    with pytest.raises(LlavaError, match="several data sets; name one: .*ai2d.gpt4v., "):
        open_records(tmp_path / "data")
    records = open_records(tmp_path / "data/ai2d(gpt4v)")
    assert read(records) == [
        ("ai2d_1", "<image>\nWhat?", "A cat.", 1), ("magpie_2", "Hi?", "A cat.", 0)
    ]  # fmt: skip
    assert not records.ignored_keys()


def test_llava_recap(tmp_path, png):
    row = {"id": "1", "image": {"bytes": png, "path": "1.jpg"}, "conversations": turns()}
    for i in range(2):
        path = tmp_path / f"set/data/train-{i:05}-of-00002.parquet"
        same.write_parquet(path, [row | {"id": f"{i}-{j}", "data_source": "x"} for j in range(3)])
    assert [record[0] for record in read(open_records(tmp_path / "set"))] == [
        f"{i}-{j}" for i in range(2) for j in range(3)
    ]


def test_sharegpt4v(tmp_path, png):
    items = [
        {"id": "0", "image": "sam/images/sa_1.png", "conversations": turns()},
        {"id": "1", "image": "coco/train2017/1.png", "conversations": turns("What?\n<image>")},
        {"id": "2", "model": "", "conversations": turns("Hi?")},
    ]
    path = same.write_json(tmp_path / "sharegpt4v_mix665k.json", items)
    assert [record[3] for record in read(open_records(path))] == [1, 1, 0]


def test_cambrian(tmp_path, png):
    items = [
        {"id": 1, "image": "chart/1.png", "source": "chartqa.json", "conversations": turns()},
        {"id": "text", "conversations": turns("Hi?"), "source": "orca.json"},
    ]
    path = tmp_path / "Cambrian7M.jsonl"
    path.write_text("\n".join(map(json.dumps, items)))
    assert read(open_records(path)) == [
        ("1", "<image>\nWhat?", "A cat.", 1), ("text", "Hi?", "A cat.", 0)
    ]  # fmt: skip


def test_the_cauldron(tmp_path, png):
    pairs = [{"user": "What?", "assistant": "A cat.", "source": "AI2D"}]
    pairs.append(pairs[0] | {"user": "Sure?", "assistant": "Yes."})
    rows = [{"images": [{"bytes": png, "path": None}] * 2, "texts": pairs}]
    same.write_parquet(tmp_path / "ai2d/train-00000-of-00001-2ce340398c113b79.parquet", rows)
    record = checked_record(open_records(tmp_path / "ai2d"), 0)
    assert record.turns[0].text == "<image>\n<image>\nWhat?" and len(record.turns) == 4


def test_llava_instruct_mix_vsft(tmp_path, png):
    user = [{"type": "text", "text": "What?\n", "index": None},
            {"type": "image", "text": None, "index": 0}]  # fmt: skip
    said = [{"type": "text", "text": "A cat.", "index": None}]
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": said}]
    rows = [{"messages": messages, "images": [{"bytes": png, "path": None}]}]
    same.write_parquet(tmp_path / "data/train-00000-of-00020.parquet", rows)
    records = open_records(tmp_path / "data/train-*.parquet")
    assert read(records) == [("0", "What?\n<image>\n", "A cat.", 1)]


def test_img2dataset(tmp_path, png):
    meta = {"caption": "A cat.", "url": "https://a/1.jpg", "key": "000000001", "width": 9}
    members = {"jpg": png, "json": json.dumps(meta).encode(), "txt": b"A cat."}
    same.write_tar(tmp_path / "cc3m/00000.tar", [("000000001", members)])
    same.write_tar(tmp_path / "cc3m/00001.tar", [("000010001", members)])
    (tmp_path / "cc3m/00000_stats.json").write_text("{}")
    records = open_records(tmp_path / "cc3m/{00000..00001}.tar")
    assert [record[1:] for record in read(records)] == [("<image>", "A cat.", 1)] * 2
    assert about(records) == ["read as captions (2 records in 2 tars)"]


def test_files_of_datasets(tmp_path, png):
    datasets = pytest.importorskip("datasets")
    rows = [{"id": str(i), "image": {"bytes": png, "path": "1.png"}, "conversations": turns()}
            for i in range(5)]  # fmt: skip
    made = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    made.to_parquet(tmp_path / "d.parquet")
    datasets.DatasetDict({"train": made, "test": made.select([0])}).save_to_disk(tmp_path / "saved")
    wanted = [(str(i), "<image>\nWhat?", "A cat.", 1) for i in range(5)]
    assert read(open_records(tmp_path / "d.parquet")) == wanted
    assert read(open_records(tmp_path / "saved")) == wanted
    assert read(open_records(tmp_path / "saved", split="test")) == wanted[:1]
    assert open_records(tmp_path / "saved")[0].images[0].read() == png


def test_files_of_webdataset(tmp_path, png):
    webdataset = pytest.importorskip("webdataset")
    with webdataset.ShardWriter(str(tmp_path / "%03d.tar"), maxcount=2, verbose=0) as shards:
        for i in range(5):
            shards.write({"__key__": f"r{i}", "png": png, "json": {"conversations": turns()}})
    records = open_records(f"{tmp_path}/{{000..002}}.tar")
    assert read(records) == [(f"r{i}", "<image>\nWhat?", "A cat.", 1) for i in range(5)]
    assert records[4].images[0].read() == png
