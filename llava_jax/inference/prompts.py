"""Prompts as token ids: a question with its history.

B rows, T length.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from llava_jax.errors import LlavaError
from llava_jax.inference.decoding import tile_slots
from llava_jax.inference.distortion import DISTORTIONS, text_ids
from llava_jax.inference.jobs import Picture, Request
from llava_jax.inference.sampling import MAX_STOP_IDS, SamplingParams
from llava_jax.models.llava import LlavaConfig
from llava_jax.text.conversation import (
    BREAK,
    IMAGE_TOKEN,
    MARKS,
    VIDEO_TOKEN,
    Turn,
    spelled_out,
    with_times,
)
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
        videos = [picture.is_video for picture in pictures]
        turns = _place_images(_read_marks(turns, videos), len(pictures))
        if any(picture.time for picture in pictures):
            turns = [Turn(t.role, t.text.replace(f"{IMAGE_TOKEN}\n", IMAGE_TOKEN)) for t in turns]
            turns = with_times(turns, [picture.time for picture in pictures])
        ids = self.ids(turns, [len(picture.layout) for picture in pictures], system, videos)
        request = Request(ids, pictures, params)
        check_request(request, self._config, stops)
        return request

    def traced(self, request: Request, answer: str) -> Request:
        """A request with its answer, which is traced; nothing is generated.

        The answer is read as in training, without the token that ends it.
        """
        marks = (*self._tokenize.special, IMAGE_TOKEN)
        space = " " if self._template.gpt[0].endswith(" ") else ""  # the prompt ends before it
        row = self._tokenize([Segment(BREAK + space + spelled_out(answer.strip(), marks))])
        ids = row.input_ids[row.offsets[:, 0] >= 0]  # without a BOS
        if not answer.strip() or not len(ids):
            raise LlavaError("the answer is empty: there is nothing to explain")
        length, limit = len(request.input_ids) + len(ids), self._config.decoder
        if length > limit.max_position_embeddings:
            raise LlavaError(
                f"the prompt and its answer have {length} tokens: the model reads at most "
                f"{limit.max_position_embeddings}"
            )
        input_ids = np.concatenate([request.input_ids, ids])
        return Request(input_ids, request.pictures, SamplingParams(max_tokens=1), traced=len(ids))

    def ids(
        self,
        turns: Sequence[Turn],
        lengths: Sequence[int],
        system: str | None = None,
        videos: Sequence[bool] | None = None,
    ) -> np.ndarray:
        """int32[T]: a conversation that waits for an answer, with placeholders for its pictures.

        Special tokens in the text of a turn are spelled out: only the template and `<image>` make
        any.

        Args:
          lengths: tokens of each picture, in the order of their `<image>`. If none is written, the
            pictures stand before the first turn.
          system: a system prompt to use instead of the template's own.
          videos: which of them are videos; none by default.
        """
        special = [token for token in self._tokenize.special if token != IMAGE_TOKEN]
        turns = [Turn(turn.role, spelled_out(turn.text, special)) for turn in turns]
        system = system and spelled_out(system, special)
        turns = _place_images(turns, len(lengths))
        if self._processor_prompt:
            ids = self._processor_prompt(turns, lengths, system, videos)
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


def _read_marks(turns: Sequence[Turn], videos: Sequence[bool]) -> Sequence[Turn]:
    """Turns in which each `<video>` is an `<image>`, if there are videos.

    videos: for each picture or video, in the order of the marks, which it is.
    """
    if not any(videos):
        return turns
    marks = MARKS.findall("".join(turn.text for turn in turns))
    if VIDEO_TOKEN in marks and len(marks) == len(videos):
        for number, (mark, is_video) in enumerate(zip(marks, videos, strict=True)):
            if mark == VIDEO_TOKEN and not is_video:
                raise LlavaError(f"mark {number} of the text is {VIDEO_TOKEN}, but it is a picture")
    return [Turn(turn.role, turn.text.replace(VIDEO_TOKEN, IMAGE_TOKEN)) for turn in turns]


def _place_images(turns: Sequence[Turn], images: int) -> Sequence[Turn]:
    """Turns with an `<image>` for each picture; without any, the pictures stand first."""
    written = sum(turn.images for turn in turns)
    if not written and images:
        return [Turn("human", f"{IMAGE_TOKEN}\n" * images + turns[0].text), *turns[1:]]
    if written != images:
        raise LlavaError(
            f"the text has {written} {IMAGE_TOKEN} but {images} image(s) were given: write one "
            f"{IMAGE_TOKEN} for each image or video, or none to have them first"
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
    if tiles > (most := tile_slots(config.image)):
        raise LlavaError(
            f"the prompt has {len(request.pictures)} images or videos of {tiles} tiles in all: "
            f"give fewer images or frames, at most {most} tiles"
        )
    _check_contrast(request, config, tiles, most)
    if len(stops) > MAX_STOP_IDS:
        raise LlavaError(
            f"{len(stops)} stop tokens, the model's own included: at most {MAX_STOP_IDS}"
        )
    if stops and max(stops) >= vocabulary:
        raise LlavaError(
            f"stop token {max(stops)} is not in the vocabulary: the model's ids go from 0 to "
            f"{vocabulary - 1}"
        )


def _check_contrast(request: Request, config: LlavaConfig, tiles: int, most: int) -> None:
    kind = request.params.contrast
    if kind and not request.pictures:
        raise LlavaError(
            f"contrast is {kind!r}, but the prompt has no picture to decode against: give one, or "
            "leave contrast out"
        )
    if kind in DISTORTIONS and 2 * tiles > most:
        raise LlavaError(
            f"contrast is {kind!r}, and the prompt has {tiles} tiles of pictures, each of them "
            f"read twice: give fewer, at most {most // 2}, or contrast 'absent'"
        )
    if kind == "absent" and not len(text_ids(request.input_ids, config)):
        raise LlavaError(
            "contrast is 'absent', but the prompt has pictures alone: give it a text, or contrast "
            "'blur' or 'noise'"
        )
