"""Prompts as token ids: a question with its history, or the output of a Hugging Face processor.

B rows, T length, N pictures in all, S side of a tile.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from llava_jax.errors import LlavaError
from llava_jax.inference.decoding import TILE_SLOTS
from llava_jax.inference.jobs import Picture, Request
from llava_jax.inference.sampling import MAX_STOP_IDS, SamplingParams
from llava_jax.models.images import features_in_turn
from llava_jax.models.llava import LlavaConfig
from llava_jax.text.conversation import IMAGE_TOKEN, Turn, spelled_out
from llava_jax.text.processor_prompt import ProcessorPrompt
from llava_jax.text.templates import Segment, Template, render
from llava_jax.text.tokenization import SegmentTokenizer

History = Sequence[tuple[str, str]]


@contextlib.contextmanager
def error_prefix(where: str) -> Iterator[None]:
    """The message of a LlavaError raised inside begins with `where`."""
    try:
        yield
    except LlavaError as error:
        raise LlavaError(f"{where}{error}") from None


class PromptReader:
    """Turns -> token ids that wait for an answer.

    Args:
      config: of the model.
      tokenizer: a Hugging Face fast tokenizer.
      template: of the conversations that the model was trained with.
      chat_template: of a Hugging Face processor, used instead of `template`.
    """

    def __init__(
        self, config: LlavaConfig, tokenizer, template: Template, chat_template: str | None
    ):
        self._config, self._template = config, template
        self._tokenize = SegmentTokenizer(tokenizer, config.image_token_id, config.use_im_start_end)
        self._processor_prompt = chat_template and ProcessorPrompt(
            tokenizer, chat_template, config.image_token_id
        )

    @property
    def takes_system(self) -> bool:
        """Whether there is a place for a system prompt."""
        if self._processor_prompt:
            return self._processor_prompt.takes_system
        return self._template.system is not None

    def request(
        self,
        turns: Sequence[Turn],
        pictures: tuple[Picture, ...],
        system: str | None,
        params: SamplingParams,
        stops: Sequence[int],
    ) -> Request:
        """The request of a conversation, checked; `stops` are the tokens that end its answer."""
        ids = self.ids(turns, [len(picture.layout.features) for picture in pictures], system)
        request = Request(ids, pictures, params)
        check_request(request, self._config, stops)
        return request

    def ids(
        self, turns: Sequence[Turn], lengths: Sequence[int], system: str | None = None
    ) -> np.ndarray:
        """int32[T]: a conversation that waits for an answer, with placeholders for its pictures.

        Special tokens in the text of a turn are spelled out: only the template and `<image>` make
        any.

        Args:
          lengths: tokens of each picture, in the order of their `<image>`. If none is written, the
            pictures stand before the first turn.
          system: a system prompt to use instead of the template's own.
        """
        special = [token for token in self._tokenize.special if token != IMAGE_TOKEN]
        turns = [Turn(turn.role, spelled_out(turn.text, special)) for turn in turns]
        system = system and spelled_out(system, special)
        turns = _place_images(turns, len(lengths))
        if self._processor_prompt:
            ids = self._processor_prompt(turns, lengths, system)
        else:
            segments = render(self._template.with_system(system), turns, generation=True)
            ids = self._tokenize(segments, lengths).input_ids
        check_vocabulary(ids[None], self._config)
        return ids

    def text_request(self, text: str, params: SamplingParams, stops: Sequence[int]) -> Request:
        """A text that is to be continued as it is, without a template."""
        ids = self._tokenize([Segment(spelled_out(text, self._tokenize.special))]).input_ids
        check_vocabulary(ids[None], self._config)
        request = Request(ids, (), params)
        check_request(request, self._config, stops)
        return request


def conversation(question: str, history: History) -> list[Turn]:
    """The turns of a history, (question, answer) pairs, and of the question that follows it."""
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


def _place_images(turns: Sequence[Turn], images: int) -> Sequence[Turn]:
    """Turns with an `<image>` for each picture; without any, the pictures stand first."""
    written = sum(turn.images for turn in turns)
    if not written and images:
        return [Turn("human", f"{IMAGE_TOKEN}\n" * images + turns[0].text), *turns[1:]]
    if written != images:
        raise LlavaError(
            f"the text has {written} {IMAGE_TOKEN} but {images} image(s) were given: write one "
            f"{IMAGE_TOKEN} for each image, or none to have them first"
        )
    return turns


def check_vocabulary(input_ids: np.ndarray, config: LlavaConfig) -> None:
    """LlavaError if int[B, T] has an id that is neither a token nor the placeholder."""
    vocabulary = config.decoder.vocab_size
    wrong = (input_ids < 0) | (input_ids >= vocabulary)
    wrong &= input_ids != config.image_token_id
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise LlavaError(
            f"token {column} of row {row} is {input_ids[row, column]}: the model's ids go from "
            f"0 to {vocabulary - 1}, and {config.image_token_id} stands for an image"
        )


def check_request(request: Request, config: LlavaConfig, stops: Sequence[int]) -> None:
    """Raises LlavaError if a request cannot be answered, whatever its pictures show.

    stops: tokens that end the answer.
    """
    length, limit = len(request.input_ids), config.decoder.max_position_embeddings
    vocabulary = config.decoder.vocab_size
    if not length:
        raise LlavaError("the prompt is empty: there is no token to answer")
    if length >= limit:
        raise LlavaError(
            f"the prompt has {length} tokens and leaves no room for an answer: the model reads "
            f"at most {limit}; shorten it or give fewer images"
        )
    tiles = sum(picture.layout.tiles for picture in request.pictures)
    if tiles > TILE_SLOTS:
        raise LlavaError(
            f"the prompt has {len(request.pictures)} images of {tiles} tiles in all: give fewer, "
            f"at most {TILE_SLOTS} tiles"
        )
    if len(stops) > MAX_STOP_IDS:
        raise LlavaError(
            f"{len(stops)} stop tokens, the model's own included: at most {MAX_STOP_IDS}"
        )
    if stops and max(stops) >= vocabulary:
        raise LlavaError(
            f"stop token {max(stops)} is not in the vocabulary: the model's ids go from 0 to "
            f"{vocabulary - 1}"
        )


def read_inputs(
    config: LlavaConfig, input_ids, pixel_values, attention_mask
) -> tuple[np.ndarray, list[np.ndarray], np.ndarray, np.ndarray]:
    """The arguments of `Llava.logits`, checked, as those of `Engine.logits`.

    Raises:
      LlavaError: they do not fit together.
    """
    input_ids = to_numpy(input_ids)
    mask = np.ones_like(input_ids) if attention_mask is None else to_numpy(attention_mask)
    if input_ids.ndim != 2 or input_ids.dtype.kind not in "iu" or 0 in input_ids.shape:
        raise LlavaError(
            f"input_ids must be whole numbers [B, T], not {input_ids.dtype}{input_ids.shape}"
        )
    if mask.shape != input_ids.shape:
        raise LlavaError(
            f"attention_mask {mask.shape} must have the shape of input_ids {input_ids.shape}"
        )
    mask = (mask != 0).astype(np.int32)
    input_ids = np.where(mask, input_ids, 0)
    check_vocabulary(input_ids, config)
    is_image = input_ids == config.image_token_id
    tiles = _deal_tiles(config, is_image, pixel_values)
    return input_ids, tiles, features_in_turn(is_image), mask


def _deal_tiles(config: LlavaConfig, is_image: np.ndarray, pixel_values) -> list[np.ndarray]:
    """The flat list of tiles, float32[n, S, S, 3] for each row by its placeholders, bool[B, T]."""
    size, tokens = config.image.size, config.tokens_per_tile
    pixels = np.zeros((0, 3, size, size)) if pixel_values is None else to_numpy(pixel_values)
    if pixels.ndim != 4 or pixels.shape[1:] != (3, size, size):
        raise LlavaError(
            f"pixel_values must be [images, 3, {size}, {size}], not {list(pixels.shape)}"
        )
    placeholders = is_image.sum(axis=1)
    if placeholders.sum() != len(pixels) * tokens:
        raise LlavaError(
            f"input_ids have {placeholders.sum()} placeholders ({config.image_token_id}) "
            f"but {len(pixels)} image(s) of {tokens} tokens need {len(pixels) * tokens}"
        )
    if (placeholders % tokens).any():
        row = int(np.argmax(placeholders % tokens != 0))
        raise LlavaError(
            f"row {row} of input_ids has {placeholders[row]} placeholders, which is no whole "
            f"number of images: each takes {tokens}"
        )
    ends = np.cumsum(placeholders // tokens)[:-1]
    return np.split(pixels.transpose(0, 2, 3, 1).astype(np.float32), ends)


def to_numpy(array) -> np.ndarray:
    """NumPy from NumPy, JAX, a list, or a PyTorch tensor of any device, dtype and grad."""
    if hasattr(array, "detach"):
        array = array.detach().cpu()
        array = array.float() if array.is_floating_point() else array
    return np.asarray(array)
