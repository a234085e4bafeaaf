"""Tokens to text: stop texts, characters of several bytes, pieces."""

import pytest

from llava_jax.inference.answer import Answer
from tests.tiny_model import byte_tokenizer

TOKENIZER = byte_tokenizer()  # a token a byte: every text crosses token boundaries


def tokens_of(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def test_an_answer_is_cut_at_the_first_stop_text():
    answer = Answer(TOKENIZER, [], ["</s>", "###"])
    answer.extend(tokens_of(" blue ##"))
    assert not answer.done and answer.text == "blue ##"
    answer.extend(tokens_of("# Human: red</s>"))
    assert answer.done and answer.text == "blue"
    answer.extend(tokens_of("more"))
    assert answer.text == "blue"


def test_an_answer_ends_at_a_stop_id():
    end = TOKENIZER.convert_tokens_to_ids("<|im_end|>")
    answer = Answer(TOKENIZER, [end], [])
    answer.extend([*tokens_of("blue"), end, *tokens_of("red")])
    assert answer.done and answer.text == "blue"


@pytest.mark.parametrize("step", [1, 2, 3])
@pytest.mark.parametrize(
    "text, expected",
    [
        ("  色は青 です。 \n", "色は青 です。"),
        ("a < b </ c</s>rest", "a < b </ c"),
        ("🙂🙃 ok\n\n", "🙂🙃 ok"),
        ("ends with </", "ends with </"),
        ("", ""),
        ("a\ufffdb", "a\ufffdb"),
    ],
)
def test_pieces_join_to_the_text_and_never_take_anything_back(text, expected, step):
    answer, pieces, ids = Answer(TOKENIZER, [], ["</s>"]), [], tokens_of(text)
    for start in range(0, len(ids), step):
        answer.extend(ids[start : start + step])
        pieces.append(answer.take())
        if "\ufffd" not in expected:
            assert "\ufffd" not in pieces[-1]
        assert expected.startswith("".join(pieces))
    pieces.append(answer.take(final=True))
    assert "".join(pieces) == answer.text == expected


def test_text_appears_while_the_answer_grows():
    answer = Answer(TOKENIZER, [], ["</s>"])
    answer.extend(tokens_of("one two"))
    assert answer.take() == "one two"
    answer.extend(tokens_of(" 青")[:-1])
    assert answer.take() == ""
    answer.extend(tokens_of("青")[-1:])
    assert answer.take() == " 青"
    assert answer.take() == ""


def test_a_stop_text_may_begin_with_the_white_space_in_front_of_an_answer():
    answer, pieces = Answer(TOKENIZER, [], ["\nUSER:"]), []
    for token in tokens_of("\nUSER: hi"):
        answer.extend([token])
        pieces.append(answer.take())
    assert answer.done and answer.text == "" and pieces == [""] * len(pieces)


def test_an_answer_cut_inside_a_character_leaves_it_out():
    answer = Answer(TOKENIZER, [], [])
    answer.extend(tokens_of("ok 青")[:-1])
    assert answer.text == "ok" and answer.take(final=True) == "ok"


@pytest.mark.parametrize("step", [1, 2, 5, 20])
@pytest.mark.parametrize(
    "stop, min_tokens, text, kept",
    [
        ("青", 2, "", 3),  # begins before the last forbidden token, ends behind it
        ("青", 4, "青 é b", 8),  # whole before the last forbidden token
        ("é", 0, "青", 6),
        ("\ufffd", 0, "青 é b", 8),  # none of the unfinished characters on the way
    ],
)
def test_stop_texts_do_not_depend_on_how_many_tokens_come_at_once(
    stop, min_tokens, text, kept, step
):
    answer, ids = Answer(TOKENIZER, [], [stop], min_tokens), tokens_of("青 é b")
    for start in range(0, len(ids), step):
        answer.extend(ids[start : start + step])
    assert (answer.text, len(answer.tokens)) == (text, kept)
