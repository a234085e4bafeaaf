"""Independent questions of one record, sharing its pictures in one row."""

import numpy as np
import pytest

from llava_jax.data.rows import RowFormat, pack
from llava_jax.errors import RecordError
from llava_jax.models.images import ImageSpec, Layout
from llava_jax.text.conversation import Turn
from llava_jax.text.templates import get_template, render, render_turns
from llava_jax.text.tokenization import (
    IGNORE_INDEX,
    SegmentTokenizer,
    token_row,
    truncate,
    turn_positions,
)
from llava_jax.text.tokenizer import load_tokenizer

EXCHANGES = [("is it red?", "yes"), ("is it round? look again", "no"), ("what is it?", "a box")]
TURNS = [
    Turn(role, text)
    for number, exchange in enumerate(EXCHANGES)
    for role, text in zip(("human", "gpt"), exchange, strict=True)
]
TURNS[0] = Turn("human", f"<image>\n{TURNS[0].text}")


@pytest.fixture
def segment_tokenizer(tokenizer_folder):
    return SegmentTokenizer(load_tokenizer(tokenizer_folder))


def alone(segment_tokenizer, template, number):
    question, answer = EXCHANGES[number]
    turns = (Turn("human", f"<image>\n{question}"), Turn("gpt", answer))
    return segment_tokenizer(render(get_template(template), turns), [3])


@pytest.mark.parametrize("template", ["v1", "chatml", "llama_2", "v0"])
def test_each_question_with_the_shared_part_is_the_question_alone(segment_tokenizer, template):
    texts = render_turns(get_template(template), TURNS, "independent")
    row = token_row(segment_tokenizer, texts, [3])
    positions = turn_positions(row.turn_ids)
    assert row.image_spans == alone(segment_tokenizer, template, 0).image_spans
    for number in range(len(EXCHANGES)):
        seen = (row.turn_ids == 0) | (row.turn_ids == number + 1)
        expected = alone(segment_tokenizer, template, number)
        np.testing.assert_array_equal(row.input_ids[seen], expected.input_ids)
        np.testing.assert_array_equal(row.labels[seen], expected.labels)
        np.testing.assert_array_equal(positions[seen], np.arange(len(expected)))


def test_the_shared_part_holds_the_images_and_nothing_learnt(segment_tokenizer):
    row = token_row(segment_tokenizer, render_turns(get_template("v1"), TURNS, "independent"), [3])
    shared = row.turn_ids == 0
    assert all(shared[start:end].all() for start, end in row.image_spans)
    assert (row.labels[shared] == IGNORE_INDEX).all()


def test_pictures_with_labels_are_shared_too():
    shown = "picture 1: <image>\npicture 2: <image>\n"
    turns = [Turn("human", shown + "which is red?"), *TURNS[1:]]
    first, second, *_ = render_turns(get_template("v1"), turns, "independent")
    assert shown + "which is red?" in "".join(segment.text for segment in first)
    assert shown + TURNS[2].text in "".join(segment.text for segment in second)


def test_questions_that_are_the_same_keep_their_last_words(segment_tokenizer):
    turns = [TURNS[0], Turn("gpt", "yes"), Turn("human", EXCHANGES[0][0]), Turn("gpt", "no")]
    row = token_row(segment_tokenizer, render_turns(get_template("v1"), turns, "independent"), [3])
    for number in (1, 2):
        first_label = int(np.argmax((row.labels != IGNORE_INDEX) & (row.turn_ids == number)))
        assert row.turn_ids[first_label - 1] == number  # the place that predicts it


def test_a_cut_row_keeps_its_turns(segment_tokenizer):
    row = token_row(segment_tokenizer, render_turns(get_template("v1"), TURNS, "independent"), [3])
    cut, _ = truncate(row, len(row) - 2)
    np.testing.assert_array_equal(cut.turn_ids, row.turn_ids[:-2])


def test_packed_rows_hold_turns_and_restarted_positions(segment_tokenizer):
    row = token_row(segment_tokenizer, render_turns(get_template("v1"), TURNS, "independent"), [3])
    single = token_row(
        segment_tokenizer, render_turns(get_template("v1"), TURNS[:2], "independent"), [3]
    )
    image = np.zeros((4, 4, 3), np.uint8)
    size = len(row) + len(single) + 5
    picture = Layout(1, np.arange(3, dtype=np.int32)), image[None]
    row_format = RowFormat(get_template("v1"), ImageSpec(4), 3, size, tiles=2, turns="independent")
    packed = pack([row, single], [picture, picture], row_format)
    np.testing.assert_array_equal(packed["turn_ids"][: len(row)], row.turn_ids)
    assert (packed["turn_ids"][len(row) :] == 0).all()
    np.testing.assert_array_equal(packed["position_ids"][: len(row)], turn_positions(row.turn_ids))
    here = slice(len(row), len(row) + len(single))
    np.testing.assert_array_equal(packed["position_ids"][here], np.arange(len(single)))


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([*TURNS[:2], Turn("human", "and <image>?"), TURNS[3]], "before the first question"),
        ([Turn("human", "look: <image> what?"), TURNS[1]], "before the first question"),
        (TURNS[:3], "needs an answer"),
    ],
)
def test_what_cannot_be_split_is_refused(turns, message):
    with pytest.raises(RecordError, match=message):
        render_turns(get_template("v1"), turns, "independent")
