"""An answer as it grows: tokens to text, stop texts, and pieces that can be shown at once."""

from collections.abc import Iterable, Sequence

REPLACEMENT = "\ufffd"  # what a tokenizer decodes the first bytes of an unfinished character to


class Answer:
    """The text of one answer, fed token by token.

    A stop text may begin and end inside tokens; it and what follows are cut off. White space
    around the answer is dropped, as the original LLaVA does.

    Args:
      tokenizer: a Hugging Face tokenizer.
      stop_ids: tokens that end the answer.
      stop_texts: texts that end it.
    """

    def __init__(self, tokenizer, stop_ids: Iterable[int], stop_texts: Sequence[str]):
        self.tokens: list[int] = []
        self.done = False
        self._tokenizer = tokenizer
        self._stop_ids = frozenset(stop_ids)
        self._stop_texts = tuple(stop_texts)
        self._decoded = ""
        self._shown = ""

    def extend(self, tokens: Iterable[int]) -> None:
        """Adds tokens, up to one that ends the answer; sets `done` if one does."""
        if self.done:
            return
        for token in tokens:
            if token in self._stop_ids:
                self.done = True
                break
            self.tokens.append(int(token))
        decoded = self._tokenizer.decode(
            self.tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        places = [p for p in (decoded.find(stop) for stop in self._stop_texts) if p >= 0]
        if places:
            decoded = decoded[: min(places)]
            self.done = True
        self._decoded = decoded

    @property
    def text(self) -> str:
        """The answer so far; a last character of which only some bytes came is left out."""
        return self._decoded.rstrip(REPLACEMENT).strip()

    def take(self, final: bool = False) -> str:
        """The text that can be shown and was not yet; all `take`s joined are `text`.

        Held back while the answer grows: an unfinished character, the beginning of a stop text,
        and trailing white space. `final` says that no token will follow.
        """
        text = self.text
        if not (final or self.done):
            text = text[: len(text) - self._pending(text)].rstrip()
        if not text.startswith(self._shown):
            return ""
        piece = text[len(self._shown) :]
        self._shown = text
        return piece

    def _pending(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop text."""
        longest = max((len(stop) for stop in self._stop_texts), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop_texts):
                return length
        return 0
