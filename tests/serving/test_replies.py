"""Answers in OpenAI's form, whole and in chunks."""

import pytest

from llava_jax.inference.answer import TokenLogprob
from llava_jax.serving.replies import LEAST_LOGPROB, Reply, TokenTexts
from llava_jax.serving.streams import events_of
from llava_jax.serving.worker import Piece
from tests.tiny_model import byte_tokenizer


def reply(chat: bool = True) -> Reply:
    return Reply(chat, "tiny", "f", TokenTexts(byte_tokenizer()), logprobs=True)


def entry(letter: str, logprob: float = -0.5) -> TokenLogprob:
    token = byte_tokenizer().encode(letter)[0]
    return TokenLogprob(token, logprob, {token: logprob})


class SentencePieces:
    """The names of a few tokens as SentencePiece gives them; decoding drops a first space."""

    def convert_ids_to_tokens(self, token: int) -> str:
        return ["\u2581the", "<0xE2>", "cat"][token]

    def decode(self, tokens, **_) -> str:
        return {0: "the", 1: "\ufffd", 2: "cat"}[tokens[0]]


def test_the_bytes_of_tokens_that_are_parts_of_a_character():
    texts = TokenTexts(byte_tokenizer())
    tokens = byte_tokenizer().encode("a€")
    assert b"".join(map(texts.bytes, tokens)) == "a€".encode()
    assert texts.text(tokens[0]) == "a" and texts.bytes(tokens[1]) == "€".encode()[:1]


def test_the_bytes_of_sentencepiece():
    texts = TokenTexts(SentencePieces())
    assert [texts.bytes(token) for token in range(3)] == [b" the", b"\xe2", b"cat"]
    assert texts.text(0) == " the"


def test_log_probabilities_without_text_are_not_lost():
    """Text can be held back (the beginning of a stop text, white space), its tokens cannot."""
    chunk = reply().chunk(0, "", [entry("a")])
    assert [entry["token"] for entry in chunk["choices"][0]["logprobs"]["content"]] == ["a"]
    assert b'"token": "a"' in events_of([Piece(0, "", [entry("a")])], reply())


@pytest.mark.parametrize("sizes", [(3,), (1, 2), (2, 0, 1)])
def test_offsets_of_tokens_go_on_from_chunk_to_chunk(sizes):
    of_text, letters, offsets = reply(chat=False), list("abc"), []
    for size in sizes:
        some = [entry(letters.pop(0)) for _ in range(size)]
        logprobs = of_text.chunk(0, "x", some)["choices"][0]["logprobs"]
        offsets += logprobs["text_offset"] if logprobs else []
        of_text.chunk(1, "x", [entry("z")])  # another answer has its own
    assert offsets == [0, 1, 2]


def test_json_has_no_infinity():
    chunk = reply().chunk(0, "a", [entry("a", float("-inf"))])
    assert chunk["choices"][0]["logprobs"]["content"][0]["logprob"] == LEAST_LOGPROB
