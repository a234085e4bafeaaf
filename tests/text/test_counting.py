"""Tokens counted by words are those of the whole text, in every kind of tokenizer."""

import json
import pickle
import random

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from llava_jax.text import counting
from llava_jax.text.counting import TokenCounter
from llava_jax.text.tokenization import fast_core

PIECES = [
    " ", "  ", "\n", "\n\n", " \n", "\t", "\u00a0", "\u3000", "\x1c", "\x85", "\0", "'s", "'S", "'",
    "a", "the", "Cat", "é", "e\u0301", "\u0301", "你好", "12", "3456", "½", ".", "?!", "(", "[0.2,",
    "-", "_", "▁", "🙂", "</s>", "<|im_start|>", "<unk>", "USER:", "ASSISTANT:", "\r\n",
]  # fmt: skip
GPT_2, LLAMA_3, QWEN_2 = None, r"\p{N}{1,3}", r"\p{N}"


def byte_level(numbers, digits=False, normalizer=None, **options):
    core = Tokenizer(models.BPE())
    cut = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    if numbers:
        cut.append(pre_tokenizers.Split(Regex(counting._WORDS % numbers), "isolated"))
    options = {"add_prefix_space": False, "use_regex": not numbers} | options
    core.pre_tokenizer = pre_tokenizers.Sequence([*cut, pre_tokenizers.ByteLevel(**options)])
    if normalizer:
        core.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(["the cat's hat, 123 the end. \n\n USER: the cat?"] * 9, trainer)
    core.add_special_tokens(["</s>", "<|im_start|>", "<unk>"])
    return core


KINDS = {
    "GPT-2": lambda: byte_level(GPT_2),
    "SmolLM2": lambda: byte_level(GPT_2, digits=True),
    "a space before the first word": lambda: byte_level(GPT_2, add_prefix_space=True),
    "Llama 3": lambda: byte_level(LLAMA_3),
    "Qwen 2": lambda: byte_level(QWEN_2, normalizer=normalizers.NFC()),
}


def texts(seed: int, count: int) -> list[str]:
    choose = random.Random(seed)
    some = lambda: choose.choice([" ", choose.choice(PIECES)])
    return [
        "",
        " ",
        "  a",
        *("".join(some() for _ in range(choose.randrange(40))) for _ in range(count)),
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_words_are_counted_as_in_the_whole_text(kind):
    core = KINDS[kind]()
    counter = pickle.loads(pickle.dumps(TokenCounter(core)))
    assert counter._words is not None
    for seed in range(4):
        some = texts(seed, 500)
        assert counter(some) == [len(core.encode(text)) for text in some]


SPACES = normalizers.Replace(" ", "▁")
# How the tokenizer of Llama 2 puts spaces, in the forms that it has had.
PUT = {
    "legacy": (normalizers.Sequence([normalizers.Prepend("▁"), SPACES]), None),
    "first": (None, pre_tokenizers.Metaspace("▁", "first", split=False)),
    "always": (None, pre_tokenizers.Metaspace("▁", "always", split=False)),
    "split": (None, pre_tokenizers.Metaspace("▁", "always", split=True)),
}


def like_llama_2(tokenizers, put, **token) -> Tokenizer:
    state = json.loads(tokenizers["llama2"].backend_tokenizer.to_str())
    core = Tokenizer.from_str(json.dumps(state | {"normalizer": None, "added_tokens": []}))
    normalizer, first = PUT[put]
    if normalizer:
        core.normalizer = normalizer
    if first:
        core.pre_tokenizer = first
    core.add_special_tokens([AddedToken(one, **token) for one in ("<s>", "</s>", "<unk>", "@")])
    return core


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("put", PUT)
def test_so_are_those_of_llama_2(tokenizers, put, normalized):
    """Spaces side by side, at the ends of a text and at added tokens are none between words."""
    core = like_llama_2(tokenizers, put, normalized=normalized)
    counter = pickle.loads(pickle.dumps(TokenCounter(core)))
    assert counter._words is not None
    assert counter._words("USER: What is</s>USER: A") == ["USER:", "What", "is</s>USER:", "A"]
    for seed in range(4):
        some = texts(seed, 500)
        assert counter(some) == [len(core.encode(text, add_special_tokens=False)) for text in some]


def test_a_vocabulary_with_tokens_across_words_is_asked_for_the_whole_text(tokenizers):
    state = json.loads(like_llama_2(tokenizers, "legacy", normalized=False).to_str())
    vocab, merges = state["model"]["vocab"], state["model"]["merges"]
    vocab["e▁"] = len(vocab)
    merges.insert(0, ["e", "▁"])
    core = Tokenizer.from_str(json.dumps(state))
    count = lambda text: len(core.encode(text, add_special_tokens=False))
    assert count("e e") != 2 * count("e")
    assert TokenCounter(core)(["e e"]) == [count("e e")]


def test_many_added_tokens_are_not_looked_for_in_every_text(tokenizers):
    core = like_llama_2(tokenizers, "legacy", normalized=False)
    core.add_special_tokens([f"<{number}>" for number in range(20)])
    assert TokenCounter(core)._words is None


def test_tokens_that_a_tokenizer_adds_are_not_counted(tokenizers):
    for tokenizer in tokenizers.values():
        core = fast_core(tokenizer)
        some = texts(9, 200)
        wanted = [len(core.encode(text, add_special_tokens=False)) for text in some]
        assert TokenCounter(core)(some) == wanted


def test_other_tokenizers_are_asked_for_the_whole_text():
    own = lambda cut: pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(use_regex=False)])
    whole = {}
    for name, change in {
        "another expression": lambda c: setattr(
            c, "pre_tokenizer", own(pre_tokenizers.Split(Regex(r"\S+\s*"), "isolated"))
        ),
        "none": lambda c: setattr(c, "pre_tokenizer", pre_tokenizers.ByteLevel(use_regex=False)),
        "another normalizer": lambda c: setattr(c, "normalizer", normalizers.Strip()),
        "a token with a space": lambda c: c.add_tokens(["the cat"]),
    }.items():  # fmt: skip
        core = byte_level(GPT_2)
        change(core)
        counter, some = TokenCounter(core), texts(3, 100)
        whole[name] = counter._words is None
        assert counter(some) == [len(core.encode(text)) for text in some]
    assert all(whole.values()), whole
