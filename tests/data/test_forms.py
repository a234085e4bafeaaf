"""Forms of conversations in files of other programs: the same data give the same batches."""

import json

import numpy as np
import pytest

from llava_jax.data.forms import check_columns
from llava_jax.data.pipeline import TrainingData
from llava_jax.data.records import about, checked_record, ignored_keys_text, open_records
from llava_jax.data.show import as_text, show
from llava_jax.errors import LlavaError, RecordError
from llava_jax.text.conversation import BREAK
from tests.data import same_records as same
from tests.data.test_tiles import FORMAT
from tests.tiny_model import byte_tokenizer, random_image


def batches(records, **changes) -> list[dict]:
    options = {"batch_size": 1, "epochs": 1, "progress": False, "seed": 1} | changes
    data = TrainingData(records, byte_tokenizer(), FORMAT, **options)
    return [batch.arrays | {"ids": batch.record_ids} for batch in data.batch_iterator()]


def assert_same(found: list[dict], wanted: list[dict]) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one.keys() == other.keys() and one["ids"] == other["ids"]
        for name in one.keys() - {"ids"}:
            np.testing.assert_array_equal(one[name], other[name], name)


def one(tmp_path, item, **options):
    random_image(0).save(tmp_path / "cat.png")
    path = tmp_path / "d.json"
    path.write_text(json.dumps([item]))
    return open_records(path, **options)


def test_forms_of_the_same_records_give_the_same_batches(tmp_path):
    paths = same.json_forms(tmp_path / "forms", tmp_path)
    wanted = batches(open_records(paths.pop("llava"), tmp_path))
    assert sum(row["tiles"].any() for row in wanted) > 4
    for path in paths.values():
        assert_same(batches(open_records(path, tmp_path)), wanted)


def test_the_log_says_which_form_was_recognised(tmp_path):
    paths = same.json_forms(tmp_path / "forms", tmp_path)
    said = {name: about(open_records(path, tmp_path)) for name, path in paths.items()}
    assert said == {
        "llava": ["read as conversations of from and value (12 records)"],
        "sharegpt": ["read as conversations of from and value (12 records)"],
        "messages": ["read as messages of role and content (12 records)"],
        "placeholders": ["read as messages of role and content parts (12 records)"],
        "addresses": ["read as messages of role and content parts (12 records)"],
        "paths in parts": ["read as messages of role and content parts (12 records)"],
        "texts": ["read as texts of user and assistant (12 records)"],
    }


def test_columns_name_a_question_and_an_answer(tmp_path):
    item = {"img": "cat.png", "query": "What?", "label": "A cat.", "question": "x", "score": 1}
    columns = {"image": "img", "question": "query", "answer": "label"}
    records = one(tmp_path, item, columns=columns)
    record = checked_record(records, 0)
    assert [turn.text for turn in record.turns] == ["<image>\nWhat?", "A cat."]
    assert record.images == (str(tmp_path / "cat.png"),)
    assert about(records) == ["read as question and answer (1 records)"]
    assert ignored_keys_text(records) == "ignored keys: score (1 record)"
    # Named like this the data are others: nothing that was measured is reused.
    swapped = {"image": "img", "question": "label", "answer": "query"}
    assert records.fingerprint() != one(tmp_path, item, columns=swapped).fingerprint()


def test_an_answer_alone_is_a_caption(tmp_path):
    record = checked_record(
        one(tmp_path, {"image": "cat.png", "text": "A cat."}, columns={"answer": "text"}), 0
    )
    assert [turn.text for turn in record.turns] == ["<image>", "A cat."]


def test_columns_choose_among_two_conversations(tmp_path):
    turns = lambda word: [{"role": "user", "content": word}, {"role": "assistant", "content": "a"}]
    item = {"messages": turns("new"), "conversations": turns("old")}
    with pytest.raises(RecordError, match="columns=\"{'conversations': 'messages'}\""):
        checked_record(one(tmp_path, item), 0)
    named = one(tmp_path, item, columns={"conversations": "messages"})
    assert checked_record(named, 0).turns[0].text == "new"


@pytest.mark.parametrize(
    "columns, words",
    [
        ({"query": "question"}, "names 'query', which is none of: id, image"),
        ({"answer": ""}, "columns.answer is ''"),
        ("abc", "columns is 'abc': give our name of each key"),
        ({"answer": "a", "conversations": "b"}, "name one of the two"),
    ],
)
def test_columns_that_make_no_sense_are_refused(columns, words):
    with pytest.raises(LlavaError, match=words):
        check_columns(columns)


def test_a_column_that_no_record_has_is_refused(tmp_path):
    item = {"q": "What?", "a": "A cat."}
    with pytest.raises(LlavaError, match="image is 'img', which no record has; its keys: a"):
        one(tmp_path, item, columns={"image": "img", "question": "q", "answer": "a"})


def talk(*parts, **more):
    user = {"role": "user", "content": [*parts, {"type": "text", "text": "What?"}]}
    return {"messages": [user, {"role": "assistant", "content": "A cat."}], **more}


IMAGE = {"type": "image"}
PARTS = [
    (talk({"type": "audio"}), "unknown part", "turn 0, part 0 has the type 'audio'"),
    (talk({"type": "text", "text": 3}), "bad text", "part 0: 'text' must be a string"),
    (talk(IMAGE, image=None), "image part", "number 0, but the record has 0"),
    (talk(IMAGE, IMAGE, image="cat.png"), "image part", "number 1, but the record has 1 image"),
    (talk(IMAGE, images=["cat.png"] * 2), "image part", "2 image(s), of which its parts show 1"),
    (talk({**IMAGE, "index": "1"}), "bad image field", "index '1' is no number"),
    (talk({**IMAGE, "image": 3}), "bad image field", "'image' must be a path or an address"),
    (talk({**IMAGE, "url": "https://a/b.png"}), "image is an address", "download it"),
    (talk({**IMAGE, "image": "../a.png"}), "image outside the root", "../a.png"),
    (talk({"type": "image_url", "image_url": {"url": "data:image/png,x"}}), "bad image field", "b"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}]},
     "unknown role", "turn 1: unknown role 'tool'"),
    ({"messages": [{"role": "user", "content": "a"},
                   {"role": "assistant", "content": "", "tool_calls": [1]}]},
     "tool call", "turn 1"),
    ({"messages": [{"role": "system", "content": [IMAGE]}]},
     "<image> in a system prompt", "turn 0"),
    ({"messages": [["a", "b"]]}, "bad turn", "expected an object with 'role' and 'content'"),
    ({"conversations": ["a", "b"]}, "bad turn", "expected an object with 'from' and 'value'"),
    ({"messages": [{"role": "user"}]}, "bad turn", "with 'role' and 'content'"),
    ({"messages": "Hi"}, "no conversations", "'messages' must be a list of turns, not 'Hi'"),
    ({"texts": [{"user": "a", "assistant": None}]}, "bad text", "'assistant' must be a string"),
]  # fmt: skip


@pytest.mark.parametrize("item, kind, words", PARTS)
def test_faults_name_the_turn_and_the_part(tmp_path, item, kind, words):
    records = one(tmp_path, item | {"id": "x"})
    with pytest.raises(RecordError) as caught:
        checked_record(records, 0)
    assert caught.value.kind == kind
    assert words in str(caught.value) and "d.json: record 0 (id 'x')" in str(caught.value)


def test_parts_show_pictures_by_number(tmp_path):
    for i in range(2):
        random_image(i).save(tmp_path / f"{i}.png")
    item = talk(
        {**IMAGE, "index": 1, "text": None, "image": {"bytes": None, "path": None}},
        {**IMAGE, "index": 0},
        images=["0.png", "1.png"],
    )
    record = checked_record(one(tmp_path, item), 0)
    assert record.image_names == ("1.png", "0.png")
    assert record.turns[0].text == "<image>\n<image>\nWhat?"


def test_text_beside_pictures_in_parts_makes_no_picture(tmp_path):
    item = talk({"type": "text", "text": "Is <image> a tag? "}, IMAGE, image="cat.png")
    records = one(tmp_path, item)
    record = checked_record(records, 0)
    assert record.turns[0].text == f"Is <{BREAK}image> a tag? <image>\nWhat?"
    shown = show(records, 0, FORMAT, byte_tokenizer())
    assert len(shown["image_slots"]) == 1 and "Is <image> a tag? " in as_text(shown, False)
    text = byte_tokenizer().decode([i for i in shown["input_ids"] if i >= 0])
    assert "Is <image> a tag? \nWhat?" in text


def test_a_system_message_replaces_the_templates(tmp_path):
    item = talk(IMAGE, image="cat.png")
    item["messages"].insert(0, {"role": "developer", "content": [{"type": "text", "text": "Be."}]})
    assert checked_record(one(tmp_path, item), 0).system == "Be."


def test_keys_of_messages_that_nothing_reads_are_reported(tmp_path):
    item = talk(IMAGE, image="cat.png")
    item["messages"][1] |= {"weight": 0, "name": None}
    assert ignored_keys_text(one(tmp_path, item)) == "ignored keys: messages.weight (1 record)"
