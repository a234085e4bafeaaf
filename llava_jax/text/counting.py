r"""How many tokens texts have, by their words, where that is the same as tokenizing them whole.

A byte-level tokenizer cuts a text by a regular expression before it looks at its vocabulary. Those
of GPT-2, Llama 3 and Qwen 2 begin anew at each space that follows another character than white
space: no match reaches across, and none looks back. So the words, each with the space before it,
can be counted once and added up:

    "USER: What is this?\nA cat."   ->   "USER:" + " What" + " is" + " this?\nA" + " cat."

Other tokenizers, and texts whose added tokens take spaces, are tokenized whole.
"""

import json
import re
from collections.abc import Sequence

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


class TokenCounter:
    """Counts the tokens of texts without those that the tokenizer adds by itself; picklable."""

    def __init__(self, core: Tokenizer):
        self._core, self._by_word, self._counts = core, _is_cut_at_spaces(core), {}

    def __getstate__(self):
        return self._core

    def __setstate__(self, core):
        self.__init__(core)

    def __call__(self, texts: Sequence[str]) -> list[int]:
        """The number of tokens of each text."""
        if not self._by_word:
            return self._whole(texts)
        if len(self._counts) > _MOST:
            self._counts.clear()
        words = [_words(text) for text in texts]
        new = list({word for row in words for word in row if word not in self._counts})
        self._counts.update(zip(new, self._whole(new), strict=True))
        return [sum(map(self._counts.__getitem__, row)) for row in words]

    def _whole(self, texts: Sequence[str]) -> list[int]:
        added = self._core.num_special_tokens_to_add(False)
        # Without offsets, which take time.
        return [len(encoding) - added for encoding in self._core.encode_batch_fast(texts)]


def _words(text: str) -> list[str]:
    if _ODD.search(text):
        return _CUT.split(text)
    return text.replace(" ", "\0 ").split("\0") if "\0" not in text else _CUT.split(text)


def _is_cut_at_spaces(core: Tokenizer) -> bool:
    """Whether the tokens of a text are those of its words."""
    added = core.get_added_tokens_decoder().values()
    if any(token.lstrip or token.rstrip or token.single_word or " " in token.content
           for token in added):  # fmt: skip
        return False
    if not isinstance(core.model, models.BPE) or core.model.dropout:
        return False
    parts = Tokenizer(models.BPE())  # as text, which is short without the vocabulary
    if core.normalizer is not None:
        parts.normalizer = core.normalizer
    if core.pre_tokenizer is not None:
        parts.pre_tokenizer = core.pre_tokenizer
    state = json.loads(parts.to_str())
    normalizer, first = state["normalizer"] or {}, state["pre_tokenizer"] or {}
    cutters = first.get("pretokenizers", [first])
    return normalizer.get("type", "NFC") == "NFC" and (
        all(cutter.get("type") in ("Digits", "ByteLevel") or _is_known(cutter)
            for cutter in cutters)
        and any(cutter.get("use_regex") or _is_known(cutter) for cutter in cutters)
    )  # fmt: skip


def _is_known(cutter: dict) -> bool:
    is_whole = cutter.get("behavior") == "Isolated" and not cutter.get("invert")
    return is_whole and cutter.get("pattern", {}).get("Regex") in _KNOWN
