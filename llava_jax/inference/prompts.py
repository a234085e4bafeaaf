"""A question, and what was said before it, as the token ids that a model reads."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from llava_jax.errors import LlavaError
from llava_jax.models.llava import LlavaConfig
from llava_jax.text.conversation import IMAGE_TOKEN, Turn
from llava_jax.text.processor_prompt import ProcessorPrompt
from llava_jax.text.templates import Template, render
from llava_jax.text.tokenization import SegmentTokenizer

History = Sequence[tuple[str, str]]


class PromptReader:
    """Turns -> token ids that wait for an answer.

    Args:
      config: the model's dimensions.
      tokenizer: a Hugging Face fast tokenizer.
      template: of the conversations it was trained with.
      chat_template: a Hugging Face processor's, to be followed in place of `template`.
    """

    def __init__(
        self, config: LlavaConfig, tokenizer, template: Template, chat_template: str | None
    ):
        self.config, self.template = config, template
        self._tokenize = SegmentTokenizer(tokenizer, config.image_token_id, config.use_im_start_end)
        self._processor_prompt = chat_template and ProcessorPrompt(
            tokenizer, chat_template, config.image_token_id
        )

    def __call__(self, turns: Sequence[Turn], images: int) -> np.ndarray:
        """int32[T]: a conversation that waits for an answer, with placeholders for its images."""
        written = sum(turn.text.count(IMAGE_TOKEN) for turn in turns)
        if not written and images:
            first = Turn("human", f"{IMAGE_TOKEN}\n" * images + turns[0].text)
            turns = [first, *turns[1:]]
        elif written != images:
            raise LlavaError(
                f"the text has {written} {IMAGE_TOKEN} but {images} image(s) were given: write one "
                f"{IMAGE_TOKEN} for each image, or none to have them first"
            )
        lengths = [self.config.tokens_per_tile] * images
        if self._processor_prompt:
            ids = self._processor_prompt(turns, lengths)
        else:
            segments = render(self.template, turns, generation=True)
            ids = self._tokenize(segments, lengths).input_ids
        check_vocabulary(ids[None], self.config)
        return ids


def conversation(question: str, history: History) -> list[Turn]:
    """Turns of the (question, answer) pairs of a history and of a last question."""
    turns = []
    if not isinstance(history, Iterable):
        raise LlavaError(f"history must hold (question, answer) pairs, not {history!r:.80}")
    for pair in history:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise LlavaError(f"history must hold (question, answer) pairs, not {pair!r:.80}")
        turns += [Turn("human", pair[0]), Turn("gpt", pair[1])]
    turns.append(Turn("human", question))
    for turn in turns:
        if not isinstance(turn.text, str):
            raise LlavaError(f"a question or answer must be text, not {turn.text!r:.80}")
        try:
            turn.text.encode()
        except UnicodeEncodeError as error:
            raise LlavaError(
                f"a question or answer has half a character, U+{ord(turn.text[error.start]):X}, at "
                f"{error.start}"
            ) from None
    return turns


def check_vocabulary(input_ids: np.ndarray, config: LlavaConfig) -> None:
    """LlavaError where int[B, T] has an id that is neither a token nor an image's placeholder."""
    vocabulary = config.decoder.vocab_size
    wrong = (input_ids < 0) | (input_ids >= vocabulary)
    wrong &= input_ids != config.image_token_id
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise LlavaError(
            f"token {column} of row {row} is {input_ids[row, column]}: the model's ids go from "
            f"0 to {vocabulary - 1}, and {config.image_token_id} stands for an image"
        )


@contextlib.contextmanager
def told_of(where: str) -> Iterator[None]:
    """A LlavaError from inside begins with `where`."""
    try:
        yield
    except LlavaError as error:
        raise LlavaError(f"{where}{error}") from None
