r"""How many tokens texts have, by their words, where that is the same as tokenizing them whole.

A byte-level tokenizer cuts a text by a regular expression before it looks at its vocabulary. Those
of GPT-2, Llama 3 and Qwen 2 begin anew at each space that follows another character than white
space: no match reaches across, and none looks back. So the words, each with the space before it,
can be counted once and added up:

    "USER: What is this?\nA cat."   ->   "USER:" + " What" + " is" + " this?\nA" + " cat."

Llama 2's, from SentencePiece, merges across a whole text. But its space, written ▁, only begins
tokens, so that no merge crosses the place before it. It puts a ▁ before every text of its own
accord, and so before each word that is counted alone:

    "USER: What is</s>USER: A"   ->   "USER:" + "What" + "is</s>USER:" + "A"

Other tokenizers, and texts whose added tokens take spaces, are tokenized whole.
"""

import json
import re
from collections.abc import Callable, Sequence

from tokenizers import Tokenizer, models

# The regular expressions; that of GPT-2 is within the byte-level pre-tokenizer.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_KNOWN = {_WORDS % r"\p{N}{1,3}", _WORDS % r"\p{N}"}
_ODD = re.compile(r"\s ")  # a space that follows white space begins no word
_CUT = re.compile(r"(?<=\S)(?= )")
_MOST = 1 << 18  # words in memory
_FEW = 16  # added tokens, each of which is looked for in every text


class TokenCounter:
    """Counts the tokens of texts without those that the tokenizer adds by itself; picklable."""

    def __init__(self, core: Tokenizer):
        self._core, self._words, self._counts = core, _cutter(core), {}

    def __getstate__(self):
        return self._core

    def __setstate__(self, core):
        self.__init__(core)

    def __call__(self, texts: Sequence[str]) -> list[int]:
        """The number of tokens of each text."""
        if self._words is None:
            return self._whole(texts)
        if len(self._counts) > _MOST:
            self._counts.clear()
        words = [self._words(text) for text in texts]
        new = list({word for row in words for word in row if word not in self._counts})
        self._counts.update(zip(new, self._whole(new), strict=True))
        return [sum(map(self._counts.__getitem__, row)) for row in words]

    def _whole(self, texts: Sequence[str]) -> list[int]:
        added = self._core.num_special_tokens_to_add(False)
        # Without offsets, which take time.
        return [len(encoding) - added for encoding in self._core.encode_batch_fast(texts)]


def _cutter(core: Tokenizer) -> Callable[[str], list[str]] | None:
    """What gives the words whose tokens are those of a text; None if nothing does."""
    added = core.get_added_tokens_decoder().values()
    if any(token.lstrip or token.rstrip or token.single_word or " " in token.content
           for token in added):  # fmt: skip
        return None
    if not isinstance(core.model, models.BPE) or core.model.dropout:
        return None
    parts = Tokenizer(models.BPE())  # as text, which is short without the vocabulary
    if core.normalizer is not None:
        parts.normalizer = core.normalizer
    if core.pre_tokenizer is not None:
        parts.pre_tokenizer = core.pre_tokenizer
    state = json.loads(parts.to_str())
    how = state["normalizer"] or {}, state["pre_tokenizer"] or {}
    if _is_byte_level(*how):
        return _words
    if len(added) <= _FEW and _puts_spaces(*how) and _begins_with_spaces(core):
        return _cutter_at_spaces([token.content for token in added])
    return None


def _words(text: str) -> list[str]:
    if _ODD.search(text):
        return _CUT.split(text)
    return text.replace(" ", "\0 ").split("\0") if "\0" not in text else _CUT.split(text)


def _is_byte_level(normalizer: dict, first: dict) -> bool:
    """Whether these are the normalizer and the pre-tokenizer of a tokenizer that `_words` fits."""
    cutters = first.get("pretokenizers", [first])
    return normalizer.get("type", "NFC") == "NFC" and (
        all(cutter.get("type") in ("Digits", "ByteLevel") or _is_known(cutter)
            for cutter in cutters)
        and any(cutter.get("use_regex") or _is_known(cutter) for cutter in cutters)
    )  # fmt: skip


def _is_known(cutter: dict) -> bool:
    is_whole = cutter.get("behavior") == "Isolated" and not cutter.get("invert")
    return is_whole and cutter.get("pattern", {}).get("Regex") in _KNOWN


def _puts_spaces(normalizer: dict, first: dict) -> bool:
    """Whether these write each space as ▁, and one before a text; see `tokenizer._take_spaces`."""
    if not first:
        prepend, replace = {"type": "Prepend", "prepend": "▁"}, {"String": " "}
        known = [prepend, {"type": "Replace", "pattern": replace, "content": "▁"}]
        return normalizer == {"type": "Sequence", "normalizers": known}
    is_known = first.get("type") == "Metaspace" and first.get("replacement") == "▁"
    return not normalizer and is_known and first.get("prepend_scheme") in ("first", "always")


def _begins_with_spaces(core: Tokenizer) -> bool:
    """Whether ▁ is a token, which only other ▁ stand before in any other token."""
    model, known = core.model, core.get_vocab()
    if model.ignore_merges or model.continuing_subword_prefix or model.end_of_word_suffix:
        return False
    return "▁" in known and not any(map(re.compile("[^▁]▁").search, known))


def _cutter_at_spaces(added: list[str]) -> Callable[[str], list[str]]:
    """Cuts at single spaces between words, and leaves them out; not next to an added token.

    There the tokenizer may begin a text of its own.
    """
    tokens = [re.escape(token) for token in added]
    before = "".join(f"(?<!{token})" for token in tokens)
    behind = "".join(f"(?!{token})" for token in tokens)
    cut = re.compile(f"(?<=[^ ▁]){before} {behind}(?=[^ ▁])")
    odd = re.compile("|".join(["  ", "^ ", " $", "▁", *(f"{token} | {token}" for token in tokens)]))
    return lambda text: cut.split(text) if odd.search(text) else text.split(" ")
