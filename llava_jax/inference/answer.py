"""An answer as it grows: tokens to text, stop texts, and pieces that can be shown at once."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from llava_jax.errors import LlavaError
from llava_jax.inference.sampling import Logprobs

REPLACEMENT = "\ufffd"  # what a tokenizer decodes the first bytes of an unfinished character to
BYTE = re.compile("<0x[0-9A-F]{2}>")  # a token of SentencePiece that is one byte


@dataclass(frozen=True)
class TokenLogprob:
    """The log probability of a token at its position, and of the likeliest tokens there.

    Attributes:
      token: its id.
      logprob: natural logarithm of the model's probability, before temperature and penalties.
      top: id -> log probability, likeliest first, as many as were asked for and are possible.
    """

    token: int
    logprob: float
    top: dict[int, float]


def token_logprobs(
    logprobs: Logprobs, row: int, tokens: Sequence[int], count: int
) -> list[TokenLogprob]:
    """Those of `tokens`, which stand first in a row of log probabilities [R, T], on the host."""
    entries = []
    for i, token in enumerate(tokens):
        top = zip(logprobs.top_ids[row, i].tolist(), logprobs.top[row, i].tolist(), strict=True)
        possible = {id: value for id, value in list(top)[:count] if value > -math.inf}
        entries.append(TokenLogprob(int(token), float(logprobs.chosen[row, i]), possible))
    return entries


@dataclass(frozen=True)
class Trace:
    """How each of A given tokens came about, after a prompt of T tokens, theirs included.

    Attributes:
      logprobs: float32[A], the log probability of each after the tokens in front of it.
      attention: float32[A, T], how the token in front of each, from which it is predicted, attends
        to the prompt: the mean over all heads of all layers, of sum 1 over T.
    """

    logprobs: np.ndarray
    attention: np.ndarray


class Detokenizer:
    """Tokens to text, as they come: what was decoded before is not decoded again.

    The text equals that of all tokens decoded at once. A last character of which only some bytes
    came is left out, so the text of fewer tokens is always a prefix of the text of more.

    Args:
      tokenizer: a Hugging Face tokenizer.
    """

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self._text = ""  # of tokens[:_end], which ends with a whole character
        # tokens[_start:_end] are decoded once more in front of new ones: what a tokenizer does at
        # the beginning of a text, such as dropping a space, must not happen in the middle.
        self._start = self._end = 0
        self._before = ""  # their text
        self._latest = 0, ""  # a number of tokens, and what follows self._text in their text

    def text(self, tokens: Sequence[int]) -> str:
        """The text of tokens, which begin with those that were kept."""
        return self._text + self._new(tokens).rstrip(REPLACEMENT)

    def keep(self, tokens: Sequence[int]) -> str:
        """The same, and tokens whose characters are whole are not decoded again."""
        new = self._new(tokens)
        if new and not new.endswith(REPLACEMENT) and self._ends_apart(tokens[-1]):
            self._text += new
            self._start, self._end = self._end, len(tokens)
            self._before = self._decode(tokens[self._start : self._end])
            self._latest = self._end, ""
            return self._text
        return self._text + new.rstrip(REPLACEMENT)

    def _new(self, tokens: Sequence[int]) -> str:
        if self._latest[0] != len(tokens):
            text = self._decode(tokens[self._start :])
            self._latest = len(tokens), text[len(self._before) :]
        return self._latest[1]

    def _ends_apart(self, token: int) -> bool:
        """Whether the text up to this token is the same whatever follows.

        SentencePiece decodes a run of bytes as a whole, special tokens within it left out.
        """
        name = self._tokenizer.convert_ids_to_tokens(token)
        return not BYTE.fullmatch(name or "") and self._decode([token]) != ""

    def _decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


class Answer:
    """The text of one answer, fed token by token.

    A stop text may begin and end inside tokens; it and the text after it are cut off. White space
    around the answer is dropped, as in the original LLaVA.

    Args:
      tokenizer: a Hugging Face tokenizer.
      stop_ids: tokens that end the answer.
      stop_texts: texts that end it.
      min_tokens: number of tokens before which no stop text ends it.

    Attributes:
      tokens: its token ids, without the one that ended it.
      logprobs: of `tokens`, if they were asked for.
      prompt_logprobs: of the prompt's tokens but the first, if they were asked for.
      prompt_tokens: length of the prompt.
      trace: of an answer that was given.
      done: no token will follow.
      finish_reason: once done, `stop`; `length` if the tokens ran out; `cancelled`; or `error`.
      error: why there is no answer.
      cancelled: nobody waits for the answer any more.
    """

    def __init__(
        self,
        tokenizer,
        stop_ids: Iterable[int],
        stop_texts: Sequence[str],
        min_tokens: int = 0,
    ):
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.prompt_logprobs: list[TokenLogprob] = []
        self.prompt_tokens = 0
        self.trace: Trace | None = None
        self.done = False
        self.finish_reason: str | None = None
        self.error: LlavaError | None = None
        self.cancelled = False
        self._detokenizer = Detokenizer(tokenizer)
        self._stop_ids = frozenset(stop_ids)
        self._stop_texts = tuple(stop_texts)
        self._min_tokens = min_tokens
        self._decoded = ""
        self._searched = 0  # no stop text ends in so many first characters
        self._shown = ""

    def extend(self, tokens: Iterable[int], logprobs: Sequence[TokenLogprob] = ()) -> None:
        """Adds tokens, up to one that ends the answer; sets `done` if one does."""
        if self.done:
            return
        before = len(self.tokens)
        for token in tokens:
            if token in self._stop_ids:
                self._finish("stop")
                break
            self.tokens.append(int(token))
        self.logprobs += logprobs[: len(self.tokens) - before]
        if before < self._min_tokens <= len(self.tokens):
            # A stop text that is whole before the last forbidden token does not count.
            self._searched = len(self._detokenizer.text(self.tokens[: self._min_tokens - 1]))
        if self._stop_text_at(self._detokenizer.text(self.tokens), len(self.tokens)) is not None:
            self._decoded = self._cut(before)
            return
        self._decoded = self._detokenizer.keep(self.tokens)
        if len(self.tokens) >= self._min_tokens:
            self._searched = len(self._decoded)

    def end(self) -> None:
        """No token will follow."""
        if not self.done:
            self.done, self.finish_reason = True, "cancelled" if self.cancelled else "length"

    def cancel(self) -> None:
        """Nobody waits for the answer any more; may be called in any thread.

        The engine ends the answer, with the tokens that it has, within two calls of the device.
        """
        self.cancelled = True

    def fail(self, error: LlavaError) -> None:
        """There will be no answer."""
        self.error = error
        self._finish("error")

    @property
    def text(self) -> str:
        """The answer so far."""
        return self._decoded.strip()

    def take(self, final: bool = False) -> str:
        """The text that can be shown and was not yet; all `take`s joined are `text`.

        Held back while the answer grows: an unfinished character, the beginning of a stop text,
        and trailing white space. `final` says that no token will follow.
        """
        text = self._decoded
        if not (final or self.done):
            # A stop text may begin with the white space that is dropped in front of the answer.
            text = text[: len(text) - self._pending(text)]
        text = text.strip()
        if not text.startswith(self._shown):
            return ""
        piece = text[len(self._shown) :]
        self._shown = text
        return piece

    def _finish(self, reason: str) -> None:
        self.done, self.finish_reason = True, reason

    def _stop_text_at(self, decoded: str, count: int) -> int | None:
        """Where the first stop text begins in the text of the first `count` tokens."""
        if not self._stop_texts or count < self._min_tokens:
            return None
        first = lambda stop: decoded.find(stop, max(0, self._searched - len(stop) + 1))
        return min((at for at in map(first, self._stop_texts) if at >= 0), default=None)

    def _cut(self, before: int) -> str:
        """Ends the answer at the token that completed a stop text; the text in front of it.

        Tokens come several at a time, and the answer must not depend on how many.
        """
        for count in range(before + 1, len(self.tokens) + 1):
            decoded = self._detokenizer.text(self.tokens[:count])
            place = self._stop_text_at(decoded, count)
            if place is not None:
                del self.tokens[count:], self.logprobs[count:]
                self._finish("stop")
                return decoded[:place]
        raise AssertionError("a stop text that no token completed")

    def _pending(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop text."""
        longest = max((len(stop) for stop in self._stop_texts), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop_texts):
                return length
        return 0
