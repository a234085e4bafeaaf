"""An answer as it grows: tokens to text, stop texts, and pieces that can be shown at once."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from llava_jax.errors import LlavaError

REPLACEMENT = "\ufffd"  # what a tokenizer decodes the first bytes of an unfinished character to


@dataclass(frozen=True)
class TokenLogprob:
    """Log probability of a token where it stands, and of the likeliest ones there.

    Attributes:
      token: its id.
      logprob: natural logarithm of the model's probability, before temperature and penalties.
      top: id -> log probability, likeliest first, as many as were asked for.
    """

    token: int
    logprob: float
    top: dict[int, float]


class Answer:
    """The text of one answer, fed token by token.

    A stop text may begin and end inside tokens; it and what follows are cut off. White space
    around the answer is dropped, as the original LLaVA does.

    Args:
      tokenizer: a Hugging Face tokenizer.
      stop_ids: tokens that end the answer.
      stop_texts: texts that end it.
      min_tokens: tokens before which no stop text ends it.

    Attributes:
      tokens: its token ids, without the one that ended it.
      logprobs: of `tokens`, where they were asked for.
      prompt_logprobs: of the prompt's tokens but the first, where they were asked for.
      prompt_tokens: length of the prompt.
      done: no token will follow.
      finish_reason: once done, `stop`, or `length` where the tokens ran out.
      error: why there is no answer: its picture could not be read.
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
        self.done = False
        self.finish_reason: str | None = None
        self.error: LlavaError | None = None
        self._tokenizer = tokenizer
        self._stop_ids = frozenset(stop_ids)
        self._stop_texts = tuple(stop_texts)
        self._min_tokens = min_tokens
        self._decoded = ""
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
        decoded = self._decode(self.tokens)
        if self._stop_text_at(decoded) is not None:
            decoded = self._cut(before)
        self._decoded = decoded

    def end(self) -> None:
        """No token will follow."""
        if not self.done:
            self._finish("length")

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

    def _decode(self, tokens: Sequence[int]) -> str:
        """Their text; a last character of which only some bytes came is left out.

        So the text of fewer tokens is always the beginning of that of more.
        """
        text = self._tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text.rstrip(REPLACEMENT)

    def _stop_text_at(self, decoded: str) -> int | None:
        """Where the first stop text begins that was not whole before the last forbidden token."""
        if not self._stop_texts or len(self.tokens) < self._min_tokens:
            return None
        early = len(self._decode(self.tokens[: self._min_tokens - 1])) if self._min_tokens else 0
        places = [decoded.find(stop, max(0, early - len(stop) + 1)) for stop in self._stop_texts]
        return min((place for place in places if place >= 0), default=None)

    def _cut(self, before: int) -> str:
        """Ends the answer at the token that completed a stop text; the text in front of it.

        Tokens came several at a time, and the answer must not depend on how many.
        """
        for count in range(before + 1, len(self.tokens) + 1):
            decoded = self._decode(self.tokens[:count])
            place = self._stop_text_at(decoded) if count >= self._min_tokens else None
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
