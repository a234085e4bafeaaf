"""Published annotations of boxes become records: from miniature files of the true layout."""

import argparse
import json
import pickle

import pytest

from llava_jax import cli
from llava_jax.data.importers import IMPORTERS, main
from llava_jax.data.records import open_records
from llava_jax.errors import LlavaError

WHERE = "Please provide the bounding box coordinate of the region this sentence describes: {}"
WHAT = "Please provide a short description for this region: <box>"


def write(root, name, value):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(value, bytes):
        path.write_bytes(value)
    else:
        path.write_text(value if isinstance(value, str) else json.dumps(value))


def imported(name, root, *options) -> list[dict]:
    """The records that the command writes, each of which the reader of records takes."""
    out = root / "out.json"
    assert cli.main(["import", name, str(root), "--out", str(out), *options]) == 0
    records = open_records(out, root)
    assert all(records[i].boxes for i in range(len(records)))
    return json.loads(out.read_text())


def turns(record) -> list[str]:
    return [turn["value"] for turn in record["conversations"]]


def refer(root, name="refcoco", file="refs(unc).p"):
    def ref(id, split, *texts, ann=1):
        sentences = [{"sent_id": 10 * id + i, "sent": text} for i, text in enumerate(texts)]
        return {"ref_id": id, "ann_id": ann, "image_id": 5, "split": split, "sentences": sentences}

    image = {"id": 5, "file_name": "COCO_train2014_000000000005.jpg", "width": 200, "height": 100}
    boxes = [{"id": 1, "bbox": [50, 0, 100.5, 50]}, {"id": 2, "bbox": [190, 90, 20, 20]}]
    write(root, f"{name}/instances.json", {"images": [image], "annotations": boxes})
    refs = [ref(1, "train", "lady", "left <image>"), ref(2, "val", "dog", ann=2)]
    write(root, f"{name}/{file}", pickle.dumps(refs, protocol=2))


def test_refer(tmp_path, capsys):
    refer(tmp_path)
    (record,) = imported("refcoco", tmp_path)
    assert record["image"] == "train2014/COCO_train2014_000000000005.jpg"
    assert turns(record) == ["<image>\n" + WHERE.format("lady"), "<box>", WHAT, "left"]
    assert record["boxes"] == [[50, 0, 150.5, 50]] * 2 and record["box_format"] == "xyxy_pixel"
    (record,) = imported("refcoco", tmp_path, "--split", "val")
    assert record["boxes"] == [[190, 90, 200, 100]]  # cut at the edge of the picture
    assert "1 records with 1 boxes (1 cut at the edge of their pictures)" in capsys.readouterr().out
    refer(tmp_path, "refcocog", "refs(umd).p")
    assert imported("refcocog", tmp_path)


def test_visual_genome(tmp_path, capsys):
    address = "https://cs.stanford.edu/people/rak248/VG_100K_2/1.jpg"
    image = {"image_id": 1, "url": address, "width": 800, "height": 600, "coco_id": None}
    write(tmp_path, "image_data.json", [image])
    region = {"region_id": 9, "image_id": 1, "phrase": "the clock", "x": 421, "y": 57, "width": 82,
              "height": 139}  # fmt: skip
    regions = [region | {"phrase": f"thing {i}"} for i in range(12)]
    regions += [region | {"x": 900}]  # nothing of it is in the picture
    write(tmp_path, "region_descriptions.json", [{"id": 1, "regions": regions}])
    first, second = imported("visual_genome", tmp_path)
    assert first["image"] == "VG_100K_2/1.jpg" and first["boxes"][0] == [421, 57, 503, 196]
    assert len(first["boxes"]) == 10 and turns(second)[1] == "<box>"
    assert turns(second)[2:] == [WHAT, "thing 11"] and second["id"] == "vg-1-1"
    assert "(1 without an area left out)" in capsys.readouterr().out
    assert imported("visual_genome", tmp_path, "--limit", "1") == [first]
    assert "1 records with 10 boxes\n" in capsys.readouterr().out  # what was cut is of all records


def coco(root, **changes):
    annotation = {"id": 1, "image_id": 7, "category_id": 3, "bbox": [10, 20, 30, 40], "iscrowd": 0}
    annotations = [
        annotation | changes,
        annotation | {"bbox": [1, 2, 3, 4]},
        annotation | {"category_id": 4, "bbox": [5, 5, 5, 5]},
        annotation | {"category_id": 4, "iscrowd": 1, "bbox": [0, 0, 90, 90]},
    ]
    images = [{"id": 7, "file_name": "000000000007.jpg", "width": 100, "height": 90}]
    images += [images[0] | {"id": 8}]  # without any annotation
    instances = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 3, "name": "car"}, {"id": 4, "name": "sheep"}],
    }
    write(root, "annotations/instances_val2017.json", instances)


def test_coco(tmp_path):
    coco(tmp_path)
    (record,) = imported("coco", tmp_path, "--split", "val2017")
    assert record["image"] == "val2017/000000000007.jpg"
    question = "<image>\nPlease provide the bounding box coordinates of every car."
    assert turns(record) == [question, "<box> <box>"]  # of the sheep, some are one crowd
    assert record["boxes"] == [[10, 20, 40, 60], [1, 2, 4, 6]]


def flickr(root, sentence="[/EN#1/people A young child] wears [/EN#2/clothing/other goggles] ."):
    write(root, "test.txt", "36979\n")
    write(root, "Sentences/36979.txt", sentence + "\n[/EN#3/scene A pool] .\n")
    xml = """<annotation><filename>36979.jpg</filename>
    <size><width>500</width><height>375</height><depth>3</depth></size>
    <object><name>1</name><name>4</name>
      <bndbox><xmin>10</xmin><ymin>20</ymin><xmax>110</xmax><ymax>120</ymax></bndbox></object>
    <object><name>2</name>
      <bndbox><xmin>1</xmin><ymin>2</ymin><xmax>3</xmax><ymax>4</ymax></bndbox></object>
    <object><name>2</name>
      <bndbox><xmin>5</xmin><ymin>6</ymin><xmax>7</xmax><ymax>8</ymax></bndbox></object>
    <object><name>3</name><scene>1</scene><nobndbox>0</nobndbox></object></annotation>"""
    write(root, "Annotations/36979.xml", xml)


def test_flickr30k(tmp_path):
    flickr(tmp_path)
    (record,) = imported("flickr30k", tmp_path, "--split", "test")  # the pool has no box
    assert record["image"] == "flickr30k-images/36979.jpg"
    assert turns(record)[1] == "A young child <box> wears goggles <box> <box> ."
    assert record["boxes"] == [[10, 20, 110, 120], [1, 2, 3, 4], [5, 6, 7, 8]]


def grit(**changes) -> dict:
    return {
        "key": "000001", "caption": "A dog in a field", "width": 200, "height": 100, "url": "x",
        "noun_chunks": [[0, 5, 0.25, 0.1, 0.5, 0.9, 0.98], [9, 16, 0.0, 0.5, 1.0, 1.0, 0.7]],
        "ref_exps": [[0, 16, 0.25, 0.1, 0.5, 0.9, 0.98]],
    } | changes  # fmt: skip


def test_grit(tmp_path):
    write(tmp_path, "00000/000001.json", grit())
    write(tmp_path, "00000_stats.json", {"count": 1})
    write(tmp_path, "rows.jsonl", json.dumps(grit(key="7", noun_chunks="[]")) + "\n")
    (record,) = imported("grit", tmp_path)
    assert record["image"] == "00000/000001.jpg"
    assert turns(record)[1] == "A dog <box> in a field <box>"
    assert record["boxes"] == [[50, 10, 100, 90], [0, 50, 200, 100]]


def run(name, root, **options):
    given = {"name": name, "root": str(root), "out": str(root / "o.json"), "split": None,
             "limit": None} | options  # fmt: skip
    return main(argparse.Namespace(**given))


def test_faults_name_file_and_record(tmp_path):
    with pytest.raises(LlavaError, match=r"instances\.json is missing: it is published at https:"):
        run("refcoco", tmp_path)
    with pytest.raises(LlavaError, match="cannot read .*image_data.json: .*No such file"):
        run("visual_genome", tmp_path)
    coco(tmp_path, bbox=[1, 2, 3])
    with pytest.raises(LlavaError, match=r"instances_val2017\.json, record 0: not enough values"):
        run("coco", tmp_path, split="val2017")
    coco(tmp_path, image_id=99)
    with pytest.raises(LlavaError, match=r"instances_val2017\.json, record 0: no 99: is it the"):
        run("coco", tmp_path, split="val2017")
    flickr(tmp_path, "[/EN#1/people A young child wears")
    with pytest.raises(LlavaError, match=r"36979\.txt, record 0: a phrase is not marked"):
        run("flickr30k", tmp_path, split="test")
    flickr(tmp_path)
    write(tmp_path, "Annotations/36979.xml", "<annotation>")
    with pytest.raises(LlavaError, match=r"36979\.xml is no annotation"):
        run("flickr30k", tmp_path, split="test")
    (tmp_path / "g").mkdir()
    with pytest.raises(LlavaError, match="holds no .json or .jsonl file of GRIT"):
        run("grit", tmp_path / "g")
    write(tmp_path, "g/a.json", grit(noun_chunks=[[0, 99, 0, 0, 1, 1, 1]]))
    with pytest.raises(LlavaError, match=r"a\.json, record 0: the phrase 0:99 is outside its"):
        run("grit", tmp_path / "g")
    with pytest.raises(LlavaError, match="has no split 'nosuch': choose one of train2017, "):
        run("coco", tmp_path, split="nosuch")
    with pytest.raises(LlavaError, match="must end with .json or .jsonl"):
        run("coco", tmp_path, out="x.txt")


def test_the_help_names_every_data_set(capsys):
    with pytest.raises(SystemExit):
        cli.main(["import", "--help"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in IMPORTERS)
