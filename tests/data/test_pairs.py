"""Records with two answers: how they are read, cut into tokens, packed, stored and shown."""

import io
import json
import pickle

import numpy as np
import pytest
from PIL import Image

from llava_jax.data.augment import Augmentation
from llava_jax.data.build import build_data_set
from llava_jax.data.parsing import check_record, parse_record
from llava_jax.data.pipeline import TrainingData
from llava_jax.data.records import checked_record, open_records
from llava_jax.data.rows import RowFormat
from llava_jax.data.show import as_text, show
from llava_jax.data.validate import validate
from llava_jax.errors import LlavaError, RecordError
from llava_jax.text.conversation import Turn
from llava_jax.text.templates import PAIR, get_template, render_turns
from llava_jax.text.tokenization import SegmentTokenizer, token_row
from tests import tiny_run
from tests.tiny_model import CONFIG, byte_tokenizer, random_image

ANSWERS = {"chosen": "It is red.", "rejected": "It is a dog."}
ASKED = [{"from": "human", "value": "<image>\nWhat?"}]
TURN = lambda text: [{"role": "assistant", "content": [{"type": "text", "text": text}]}]
FORMS = {
    "question": {"question": "What?", **ANSWERS},
    "messages": {"messages": [{"role": "user", "content": "<image>\nWhat?"}], **ANSWERS},
    "parts": {
        "prompt": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}
        ],
        "chosen": TURN(ANSWERS["chosen"]),
        "rejected": TURN(ANSWERS["rejected"]),
    },
    "JSON text": {"pair": json.dumps({"question": "What?", **ANSWERS})},
    "prompt": {"prompt": "<image>\nWhat?", **ANSWERS},
    "conversation": {"conversations": ASKED, **ANSWERS},
    "last answer": {
        "conversations": [*ASKED, {"from": "gpt", "value": ANSWERS["chosen"]}],
        "rejected": ANSWERS["rejected"],
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_each_form_of_a_pair_is_the_same_record(form):
    record = parse_record(
        {"id": "7", "image": "a.png", "note": 1, **FORMS[form]}, 0, None, pairs=True
    )
    assert record.turns == (Turn("human", "<image>\nWhat?"), Turn("gpt", "It is red."))
    assert record.rejected == "It is a dog." and record.ignored_keys == ("note",)


def test_without_rejected_the_other_keys_are_ignored_as_before():
    item = FORMS["last answer"] | {"chosen": "x", "prompt": "y", "rejected": None, "pair": "left"}
    record = parse_record(item, 0, None, pairs=True)
    assert record.rejected is None and record.ignored_keys == ("chosen", "prompt", "pair")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rejected": 3}, "'rejected' must be a string, not 3"),
        ({"rejected": "  "}, "'rejected' is empty; leave the record out"),
        ({"rejected": "an <image>"}, "the rejected answer may not hold a picture's place"),
        ({"rejected": "It is red."}, "both answers are the same, so neither is better"),
        ({"chosen": 3}, "'chosen' must be a string, not 3"),
        ({"prompt": ""}, "has 'chosen' and 'rejected' but no question; its keys: .image, prompt"),
        ({"chosen": [{"role": "assistant", "content": [{"type": "image"}]}]}, "be a string, not"),
        ({"chosen": [{"from": "gpt", "value": "a"}] * 2}, "'chosen' must be a string, not"),
        ({"chosen": None, "prompt": None, "conversations": ASKED}, "ends with a human turn; add"),
        ({"prompt": FORMS["last answer"]["conversations"]}, "has 'chosen', another: keep"),
        ({"prompt": [{"user": "What?", "assistant": "Red."}]}, "has 'chosen', another: keep"),
        ({"prompt": [{"from": ["human"], "value": "What?"}]}, "turn 0: unknown role"),
        ({"conversations": ASKED}, "has 'conversations' and 'prompt': name the one to read, as in"),
        ({"chosen": " "}, "'chosen' is empty; leave the record out"),
        (
            {"box_format": "xyxy_pixel", "boxes": [[0, 0, 1, 1]]},
            "write the boxes of a pair as text",
        ),
    ],
)
def test_a_faulty_pair_is_refused(changes, message):
    with pytest.raises(RecordError, match=message):
        item = {"image": "a.png", **FORMS["prompt"], **changes}
        check_record(parse_record(item, 0, None, pairs=True))


def test_what_the_recipe_names_is_the_question_of_a_pair():
    item = {"image": "a.png", "dialog": ASKED, "question": "Another?", "messages": ASKED, **ANSWERS}
    read = lambda item, columns: parse_record(item, 0, None, columns, pairs=True)
    assert read(item, {"conversations": "dialog"}).turns[0].text == "<image>\nWhat?"
    assert read(item, {"question": "question"}).turns[0].text == "<image>\nAnother?"
    item = FORMS["last answer"] | {"image": "a.png", "messages": ASKED}
    columns = {"conversations": "conversations"}
    assert read(item, columns).turns[1].text == "It is red."
    item = FORMS["prompt"] | {"prompt": "[1, 2]"}  # no list of turns
    assert read(item, {}).turns[0].text == "[1, 2]"


@pytest.mark.parametrize("columns", [{}, {"question": "question"}, {"prompt": "prompt"}])
def test_an_answer_or_a_question_that_a_pair_leaves_unread_is_listed(columns, tmp_path):
    item = {"id": "7", "question": "What?", "answer": "Red.", **ANSWERS, "note": 1}
    unread = ["answer", "note"]
    if columns:
        item |= {"prompt": "What else?", "messages": ASKED}
        other = {"question": "prompt", "prompt": "question"}[next(iter(columns))]
        unread = sorted([*unread, other, "messages"])
    record = parse_record(item, 0, None, columns, pairs=True)
    assert sorted(record.ignored_keys) == unread and record.turns[1].text == "It is red."
    (tmp_path / "pairs.json").write_text(json.dumps([item, item]))
    records = open_records(tmp_path / "pairs.json", columns=columns, pairs=True)
    assert records.ignored_keys() == dict.fromkeys(record.ignored_keys, 2)


def test_a_conversation_with_a_rejected_answer_is_a_conversation_where_no_pairs_are_read(folder):
    item = FORMS["last answer"] | {"image": "0.png", "chosen": "It is blue."}
    with pytest.raises(RecordError, match="has 'chosen', another"):
        parse_record(item, 0, None, pairs=True)
    record = parse_record(item, 0, None)
    assert record.rejected is None and record.turns[-1].text == ANSWERS["chosen"]
    assert sorted(record.ignored_keys) == ["chosen", "rejected"]
    (folder / "talks.json").write_text(json.dumps([FORMS["last answer"] | {"image": "0.png"}] * 2))
    path = build_data_set(folder / "talks.json", None, folder / "out", "talks", progress=False)
    (folder / "list.yaml").write_text("datasets: [{json_path: talks.json}]")
    for source in (path, folder / "talks.json", folder / "list.yaml"):
        for pairs in (False, True):
            records = pickle.loads(pickle.dumps(open_records(source, pairs=pairs)))
            assert (records[1].rejected is not None) == pairs
            assert records.ignored_keys() == ({} if pairs else {"rejected": 2})
            assert ("pairs of answers" in records.forms()[0]) == pairs
    f = RowFormat.of(CONFIG, "chatml", 200, 4)
    records = open_records(folder / "talks.json")
    data = TrainingData(records, byte_tokenizer(), f, batch_size=1, epochs=1, progress=False)
    assert data.records_used == 2 and "ignored keys: rejected (2 records)" in data.describe()


@pytest.mark.parametrize("form", sorted(FORMS.keys() - {"last answer"}))
def test_a_pair_alone_says_which_loss_reads_it(form):
    with pytest.raises(RecordError, match="; pairs of answers are read only with config.loss=dpo"):
        check_record(parse_record({"id": "7", "image": "a.png", **FORMS[form]}, 0, None))


@pytest.mark.parametrize("template", ["v1", "v0", "chatml", "llama_2", "plain", "mistral_instruct"])
def test_nothing_but_the_two_answers_is_learnt(template):
    turns = [Turn("human", "<image>\nWhat?"), Turn("gpt", "A cat."), Turn("human", "Sure?")]
    turns = turns[:1] if template == "plain" else turns
    texts = render_turns(
        get_template(template), [*turns, Turn("gpt", "Yes.")], PAIR, rejected="No."
    )
    for text, answer, other in zip(texts, ("Yes.", "No."), ("No.", "Yes."), strict=True):
        whole = "".join(segment.text for segment in text)
        learnt = "".join(segment.text for segment in text if segment.supervised)
        assert answer in learnt and other not in whole and "A cat." not in learnt
        assert not any(segment.leading_supervised_tokens for segment in text)
        (alone,) = render_turns(
            get_template(template), [*turns, Turn("gpt", answer)], "conversation"
        )
        assert whole == "".join(segment.text for segment in alone)
        assert learnt.startswith(answer) or get_template(template).supervise_gpt_role


def test_the_prompt_is_stored_once():
    """As in the docstring of `PreferenceLoss`: the prompt is turn 0, the answers turns 1 and 2."""
    tokenizer = SegmentTokenizer(byte_tokenizer())
    turns = [Turn("human", "<image>\nWhat?"), Turn("gpt", "It is red.")]
    words = get_template("chatml"), turns
    texts = render_turns(*words, PAIR, rejected="No.")
    row = token_row(tokenizer, texts, [4])
    alone = [tokenizer(text, [4]) for text in texts]
    assert len(row) < len(alone[0]) + 20
    for turn, text in enumerate(alone, 1):
        mine = (row.turn_ids == 0) | (row.turn_ids == turn)
        np.testing.assert_array_equal(row.input_ids[mine], text.input_ids)
        np.testing.assert_array_equal(row.labels[mine], text.labels)
    assert (row.labels[row.turn_ids == 0] == -100).all() and row.image_spans[0][1] <= sum(
        row.turn_ids == 0
    )


@pytest.fixture
def folder(tmp_path):
    for i in range(6):
        random_image(i).save(tmp_path / f"{i}.png")
    items = [tiny_run.pair(i) for i in range(6)]
    items[2]["rejected"] = "long " * 30
    (tmp_path / "pairs.json").write_text(json.dumps(items))
    return tmp_path


def row_format(max_length: int = 200) -> RowFormat:
    return RowFormat.of(CONFIG, "chatml", max_length, 4, row_length=400, turns=PAIR)


def test_a_pair_that_is_too_long_is_left_out_and_not_cut(folder):
    records, f = open_records(folder / "pairs.json", pairs=True), row_format()
    options = {"batch_size": 1, "epochs": 1, "progress": False}
    data = TrainingData(records, byte_tokenizer(), f, **options)
    assert data.refused == {"a pair is too long at max_length=200": [2]} and not data.records_cut
    assert "needing up to" in data.describe()
    batches = [batch.arrays for batch in data.batch_iterator()]
    assert all(batch["turn_ids"].max() == 2 for batch in batches)
    assert sum(batch["segment_ids"].max() for batch in batches) == 5 > len(batches)
    assert "left out: a pair is too long" in show(records, 2, f, byte_tokenizer())["training"]


def test_a_pair_is_shown_and_validated(folder):
    records, f = open_records(folder / "pairs.json", pairs=True), row_format()
    text = as_text(show(records, 0, f, byte_tokenizer()), colour=False)
    assert "«red<|im_end|>»" in text and "«green<|im_end|>»" in text
    assert "a pair: the chosen answer, then the rejected one; each sees the prompt alone" in text
    assert text.count("What?") == 1
    report = validate(records, f, byte_tokenizer(), progress=False, threads=1)
    assert not report.faults
    items = json.loads((folder / "pairs.json").read_text())
    items[0]["rejected"] = "x<|endoftext|>"
    (folder / "pairs.json").write_text(json.dumps(items))
    report = validate(
        open_records(folder / "pairs.json", pairs=True),
        f,
        byte_tokenizer(),
        progress=False,
        threads=1,
    )
    (note,) = report.notes["special token in the text"]
    assert note.endswith("rejected: '<|endoftext|>'")


def test_a_data_set_keeps_pairs(folder):
    source = open_records(folder / "pairs.json", pairs=True)
    path = build_data_set(folder / "pairs.json", None, folder / "out", "pairs", progress=False)
    stored = open_records(path, pairs=True)
    for a, b in zip(source, stored, strict=True):
        assert (a.id, a.turns, a.rejected) == (b.id, b.turns, b.rejected)
    items = json.loads((folder / "pairs.json").read_text())
    items[0]["rejected"] = "another"
    (folder / "other.json").write_text(json.dumps(items))
    with pytest.raises(LlavaError, match="holds other data"):
        build_data_set(folder / "other.json", None, folder / "out", "pairs", progress=False)


def test_a_picture_whose_rejected_answer_names_a_side_is_not_mirrored():
    item = {"image": "a.png", **FORMS["prompt"], "rejected": "On the left."}
    record = parse_record(item, 0, None, pairs=True)
    picture = Image.fromarray(np.arange(27, dtype=np.uint8).reshape(3, 3, 3))
    changed = Augmentation(flip=1.0)(record, [picture], 0, 0)
    np.testing.assert_array_equal(changed.images[0], picture)


def published(root, name):
    """Two pairs as RLAIF-V has them, or, in one column, RLHF-V."""
    import pyarrow
    import pyarrow.parquet

    texts = [
        {"question": "What?", **ANSWERS},
        {"question": "Where?", "chosen": "On a sofa,\n\nasleep.", "rejected": "Outside."},
    ]
    columns = {key: [text[key] for text in texts] for key in texts[0]}
    if name == "RLHF-V":
        columns = {"text": list(map(json.dumps, texts))}
    file = io.BytesIO()
    random_image(0).save(file, "PNG")
    columns["image"] = [{"bytes": file.getvalue(), "path": None}] * 2
    columns |= {"idx": [7, 8], "ds_name": [name] * 2, "image_path": ["x.jpg"] * 2}
    root.mkdir()
    pyarrow.parquet.write_table(pyarrow.table(columns), root / "part_000.parquet")


@pytest.mark.parametrize("name", ["RLAIF-V", "RLHF-V"])
def test_published_files_are_read(name, tmp_path):
    published(tmp_path / "set", name)
    columns = {"id": "idx"} | ({"pair": "text"} if name == "RLHF-V" else {})
    records = open_records(tmp_path / "set", columns=columns, pairs=True)
    first, second = (checked_record(records, index) for index in (0, 1))
    assert first.id == "7" and len(first.images) == 1
    assert [turn.text for turn in first.turns] == ["<image>\nWhat?", "It is red."]
    assert second.turns[1].text == "On a sofa,\n\nasleep." and second.rejected == "Outside."
    assert "ds_name" in records.ignored_keys() and "chosen" not in records.ignored_keys()
    (about,) = records.forms()
    assert about == ("pairs of answers, question and answer (2 records in 1 Parquet file)")
    data = TrainingData(
        records, byte_tokenizer(), row_format(), batch_size=1, epochs=1, progress=False
    )
    assert next(data.batch_iterator()).arrays["turn_ids"].max() == 2
