import hashlib
import json
import os
import pickle

import pytest

from llava_jax.data.parsing import check_record
from llava_jax.data.records import checked_record, ignored_keys_text, open_records
from llava_jax.errors import LlavaError, RecordError

HUMAN = {"from": "human", "value": "hi"}
GPT = {"from": "gpt", "value": "yo"}
PICTURE = {"from": "human", "value": "<image>\nhi"}


def write(tmp_path, items, name="d.json"):
    (tmp_path / "cat.png").write_bytes(b"x")
    path = tmp_path / name
    path.write_text(
        "\n\n".join(map(json.dumps, items)) + "\n" if name.endswith("l") else json.dumps(items)
    )
    return path


@pytest.mark.parametrize("name", ["d.json", "d.jsonl"])
def test_reads_records(tmp_path, name):
    items = [
        {"id": "a", "image": "cat.png", "conversations": [PICTURE, GPT], "model": "x"},
        {"id": 7, "conversations": [HUMAN, GPT]},
        {"image": ["cat.png", "cat.png"], "conversations": [PICTURE, GPT, PICTURE, GPT]},
    ]
    records = pickle.loads(pickle.dumps(open_records(write(tmp_path, items, name))))
    assert len(records) == 3
    first, second, third = (records[i] for i in range(3))
    assert first.images == (str(tmp_path / "cat.png"),) and first.image_names == ("cat.png",)
    assert [turn.role for turn in first.turns] == ["human", "gpt"]
    assert second.id == "7" and second.images == ()
    assert third.id == "2" and len(third.images) == 2
    for item in (first, second, third):
        check_record(item, records.image_root)


def test_line_separators_inside_json_lines_are_text(tmp_path):
    path = tmp_path / "d.jsonl"
    item = {"conversations": [{"from": "human", "value": "a\u2028b"}, GPT]}
    path.write_text(json.dumps(item, ensure_ascii=False), encoding="utf-8")
    assert open_records(path)[0].turns[0].text == "a\u2028b"


FAULTY = [
    ({"id": "x"}, "no conversations", "no 'conversations'"),
    ({"conversations": []}, "no conversations", "must be a list of turns, not []"),
    ([1], "not an object", "JSON object"),
    ({"conversations": [{"from": "system", "value": "s"}]}, "no conversations", "record 1"),
    ({"conversations": [HUMAN, {"from": "system", "value": "s"}]}, "unknown role", "first turn"),
    ({"conversations": [{"from": "tool", "value": "s"}]}, "unknown role", "'tool'; it must be"),
    ({"query": "a", "label": "b"}, "no conversations", "columns=\"{'question': 'query', 'answ"),
    ({"conversation": [HUMAN, GPT]}, "no conversations", "did you mean 'conversations'"),
    ({"audio": "a.wav", "conversations": [HUMAN, GPT]}, "audio field", "only images"),
    ({"videos": 3, "conversations": [HUMAN, GPT]}, "bad video field", "must be a path or a list"),
    ({"video": "../a.mp4", "conversations": [HUMAN, GPT]}, "video outside the root", "inside"),
    ({"video": "http://a/b.mp4", "conversations": [HUMAN, GPT]}, "video is an address", "save it"),
    ({"video": [""], "conversations": [HUMAN, GPT]}, "bad video field", "a video path is empty"),
    ({"video": "a.mp4", "conversations": [PICTURE, GPT]}, "missing video", "a.mp4"),
    ({"video": "a.mp4", "image": "cat.png", "conversations": [HUMAN, GPT]}, "<video> count",
     "0 <video> in its text but 1 video(s): write one <video> for each"),
    ({"images": ["cat.png"], "conversations": [HUMAN, GPT]}, "<image> count", "1 image(s)"),
    (
        {"photo": "cat.png", "conversations": [PICTURE, GPT]},
        "<image> count", "0 image(s); nothing reads its keys 'photo'",
    ),
    (
        {"imgae": "cat.png", "conversations": [PICTURE, GPT]},
        "<image> count", "did you mean 'image' instead of 'imgae'?",
    ),
    (
        {"image_path": "a.png", "image_file": "b.png", "conversations": [PICTURE, GPT]},
        "bad image field", "different images in 'image_path' and 'image_file'",
    ),
    ({"system": 3, "conversations": [HUMAN, GPT]}, "bad text", "'system' must be a string"),
    (
        {"system": "a", "conversations": [{"from": "system", "value": "b"}, HUMAN, GPT]},
        "several system prompts", "'conversations' and 'system'",
    ),
    (
        {"system": "see <image>", "conversations": [HUMAN, GPT]},
        "<image> in a system prompt", "system prompt",
    ),
    ({"image": "https://a.b/c.png", "conversations": [PICTURE, GPT]}, "image is an address", "dow"),
    ({"image": "iVBO" * 9999, "conversations": [PICTURE, GPT]}, "bad image field", "base64"),
    ({"image": "data:image/png,x", "conversations": [PICTURE, GPT]}, "bad image field", "base64"),
    ({"image": "a" * 9999 + ".png", "conversations": [PICTURE, GPT]}, "missing image", "aaa.png"),
    ({"conversations": [{"from": ["human"], "value": "s"}]}, "unknown role", "unknown role"),
    ({"conversations": [{"from": "human"}]}, "bad turn", "turn 0"),
    ({"conversations": [{"from": "human", "value": 3}]}, "bad text", "'value' must be a string"),
    ({"conversations": [{"from": "human", "value": "\ud800"}, GPT]}, "bad text", "surrogate"),
    ({"conversations": [GPT, HUMAN]}, "turns do not alternate", "turn 0"),
    ({"conversations": [HUMAN, HUMAN]}, "turns do not alternate", "turn 1"),
    ({"conversations": [HUMAN, GPT, HUMAN]}, "last turn unanswered", "human turn"),
    ({"conversations": [PICTURE, GPT]}, "<image> count", "1 <image> in its text but 0 image"),
    ({"image": "cat.png", "conversations": [HUMAN, GPT]}, "<image> count", "0 <image>"),
    (
        {"image": "cat.png", "conversations": [HUMAN, {"from": "gpt", "value": "<image>"}]},
        "<image> in an answer", "turn 1",
    ),
    ({"image": 5, "conversations": [PICTURE, GPT]}, "bad image field", "5"),
    ({"image": [5], "conversations": [PICTURE, GPT]}, "bad image field", "5"),
    ({"image": "no.png", "conversations": [PICTURE, GPT]}, "missing image", "no.png"),
    ({"image": ".", "conversations": [PICTURE, GPT]}, "missing image", "not a file"),
    ({"image": "", "conversations": [PICTURE, GPT]}, "bad image field", "path is empty"),
    ({"image": "../a.png", "conversations": [PICTURE, GPT]}, "image outside the root", "../a.png"),
    ({"image": "/etc/passwd", "conversations": [PICTURE, GPT]}, "image outside the root", "/etc"),
    ({"image": "a\0.png", "conversations": [PICTURE, GPT]}, "image outside the root", "record 1"),
]  # fmt: skip


@pytest.mark.parametrize("item, kind, words", FAULTY)
def test_faults_name_file_and_record(tmp_path, item, kind, words):
    path = write(tmp_path, [{"conversations": [HUMAN, GPT]}, item])
    with pytest.raises(RecordError) as caught:
        checked_record(open_records(path), 1)
    message = str(caught.value)
    assert caught.value.kind == kind
    assert words in message and str(path) in message and "record 1" in message
    assert len(message) < len(str(path)) + 500  # a value is cut, however long it is
    if isinstance(item, dict):
        assert f"id '{item.get('id', 1)}'" in message
    assert pickle.loads(pickle.dumps(caught.value)).kind == kind


PNG = "data:image/png;base64,iVBORw0KGgo="


@pytest.mark.parametrize(
    "fields, images, ignored",
    [
        ({"images": ["cat.png"]}, ["cat.png"], []),
        ({"images": "cat.png"}, ["cat.png"], []),
        ({"image_path": "cat.png"}, ["cat.png"], []),
        ({"image_paths": ["cat.png"], "images": []}, ["cat.png"], []),
        ({"image_file": "cat.png", "images": ["cat.png"]}, ["cat.png"], []),
        ({"image": "cat.png", "image_path": "cat.png"}, ["cat.png"], []),
        ({"image": "cat.png", "image_path": "/data/cat.png"}, ["cat.png"], ["image_path"]),
        ({"image": PNG}, [b"\x89PNG\r\n\x1a\n"], []),
        ({"image": "cat.png", "score": 3, "source": "web", "video": None}, ["cat.png"], ["score"]),
    ],
)
def test_images_under_other_keys(tmp_path, fields, images, ignored):
    records = open_records(write(tmp_path, [{"conversations": [PICTURE, GPT]} | fields]))
    record = checked_record(records, 0)
    root = str(tmp_path) + "/"
    assert list(record.images) == [i if isinstance(i, bytes) else root + i for i in images]
    assert list(record.ignored_keys) == ignored
    assert records.ignored_keys() == dict.fromkeys(ignored, 1)


@pytest.mark.parametrize("key", ["system", "system_prompt", "conversations"])
def test_a_record_may_bring_its_system_prompt(tmp_path, key):
    talk = [HUMAN, GPT]
    item = {key: "Be brief."} | {"conversations": talk}
    if key == "conversations":
        item = {"conversations": [{"from": "system", "value": "Be brief."}, *talk]}
    record = checked_record(open_records(write(tmp_path, [item, {"conversations": talk}])), 0)
    assert record.system == "Be brief." and [turn.role for turn in record.turns] == ["human", "gpt"]
    assert open_records(tmp_path / "d.json")[1].system is None


def test_ignored_keys_are_counted(tmp_path):
    weighted = {"from": "gpt", "value": "yo", "weight": 0}
    items = [{"conversations": [HUMAN, GPT], "foo": 1}, {"conversations": [HUMAN, weighted]}]
    items += [{"conversations": [HUMAN, GPT], "foo": ["x"], "bar": "", "model": "m"}, "no object"]
    text = ignored_keys_text(open_records(write(tmp_path, items)))
    assert text == "ignored keys: foo (2 records), conversations.weight (1 record)"
    assert ignored_keys_text(open_records(write(tmp_path, [{"conversations": []}]))) == ""


def test_the_fingerprint_changes_where_more_is_read_than_once_was(tmp_path):
    plain = {"image": "cat.png", "conversations": [PICTURE, GPT], "foo": 1}
    path = write(tmp_path, [plain])
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert open_records(path).fingerprint() == digest
    for more in ({"system": "s"}, {"images": ["cat.png"], "image": None}):
        assert not open_records(write(tmp_path, [plain | more])).fingerprint().isalnum()


def test_links_must_stay_inside_the_root(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir(), outside.mkdir()
    (outside / "cat.png").write_bytes(b"x")
    (root / "real.png").write_bytes(b"x")
    os.symlink(outside / "cat.png", root / "file_link.png")
    os.symlink(outside, root / "folder_link")
    os.symlink(root / "real.png", root / "inner_link.png")
    names = ["real.png", "inner_link.png", "file_link.png", "folder_link/cat.png"]
    items = [{"image": name, "conversations": [PICTURE, GPT]} for name in names]
    path = tmp_path / "d.json"
    path.write_text(json.dumps(items))
    records = open_records(path, root)
    checked_record(records, 0), checked_record(records, 1)
    for index in (2, 3):
        with pytest.raises(RecordError, match="outside the image root"):
            checked_record(records, index)


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("d.json", b'[{"id": 1},\n {]', "line 2 column 3"),
        ("d.jsonl", b'{"a": 1}\n\n{"b"\n', "line 3 (record 1)"),
        ("d.json", b"{}\n{}", "name it .jsonl"),
        ("d.json", b"[]", "holds no records"),
        ("d.jsonl", b"\n", "holds no records"),
        ("d.json", b'{"a": 1}', "JSON list of records, not an object with the keys 'a'"),
        ("d.json", b"3", "JSON list of records, not 3"),
        ("d.json", b'["\xff"]', "offset 2"),
        ("d.csv", b"a", ".json or .jsonl"),
    ],
)
def test_unreadable_files(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(LlavaError) as caught:
        open_records(tmp_path / name)
    assert words in str(caught.value) and name in str(caught.value)


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(LlavaError, match="no data file"):
        open_records(tmp_path / "no.json")
    with pytest.raises(LlavaError, match="dataset_info.json"):
        open_records(tmp_path)
    path = write(tmp_path, [{"conversations": [HUMAN, GPT]}])
    with pytest.raises(LlavaError, match="not a folder"):
        open_records(path, tmp_path / "no")
