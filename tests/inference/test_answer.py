"""Tokens to text: stop texts, characters of several bytes, pieces."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from llava_jax.inference.answer import Answer, Detokenizer
from tests.tiny_model import byte_tokenizer

TOKENIZER = byte_tokenizer()  # a token a byte: every text crosses token boundaries
BYTES = bytes_to_unicode()


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


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Words that begin with a space, bytes, a special token; the first space is dropped."""
    words = ["\u2581", "\u2581\u2581", "\u2581red", "\u2581a", "blue", ".", "\n"]
    tokens = [*(f"<0x{byte:02X}>" for byte in range(256)), *words]
    core = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, [], byte_fallback=True))
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    core.add_special_tokens(["</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")


@pytest.mark.parametrize("make", [byte_tokenizer, sentencepiece_like])
def test_text_that_is_decoded_as_it_comes_is_that_of_all_tokens_at_once(make):
    tokenizer, rng = make(), random.Random(0)
    characters = [list(text.encode()) for text in ("é", "青", "🙂", "\ufffd", "a", " ")]
    byte = lambda value: tokenizer.convert_tokens_to_ids(
        f"<0x{value:02X}>" if make is sentencepiece_like else BYTES[value]
    )
    for _ in range(300):
        ids = []
        while len(ids) < 30:
            if rng.random() < 0.4:
                ids += map(byte, rng.choice(characters)[: rng.choice([1, 2, 9, 9, 9])])
            else:
                ids.append(rng.randrange(len(tokenizer)))
        whole = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        detokenizer, read = Detokenizer(tokenizer), 0
        while read < len(ids):
            read += rng.choice([1, 1, 2, 3, 8])
            text = detokenizer.keep(ids[:read])
        assert text == whole.rstrip("\ufffd")


def test_a_long_answer_is_not_decoded_again_and_again():
    decoded = []

    class Counting:
        convert_ids_to_tokens = TOKENIZER.convert_ids_to_tokens

        def decode(self, tokens, **options):
            decoded.append(len(tokens))
            return TOKENIZER.decode(tokens, **options)

    answer, ids = Answer(Counting(), [], ["</s>"]), tokens_of("one two three " * 100)
    for start in range(0, len(ids), 8):
        answer.extend(ids[start : start + 8])
    assert answer.text == ("one two three " * 100).strip()
    assert sum(decoded) < 5 * len(ids)


def test_a_cancelled_answer_keeps_what_it_has():
    answer = Answer(TOKENIZER, [], [])
    answer.extend(tokens_of("blue"))
    answer.cancel()
    assert not answer.done
    answer.end()
    assert (answer.done, answer.finish_reason, answer.text) == (True, "cancelled", "blue")
