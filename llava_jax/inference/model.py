"""`Llava`: a model to ask, from Python.

B rows, T length, N images in all, S image side, V vocabulary.
"""

import contextlib
import functools
import numbers
import os
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from PIL import Image

from llava_jax.data.images import load_image, preprocess
from llava_jax.data.records import IMAGE_TOKEN, Turn
from llava_jax.data.templates import get_template, render
from llava_jax.data.tokenization import SegmentTokenizer, load_tokenizer
from llava_jax.errors import LlavaError
from llava_jax.inference.answer import Answer
from llava_jax.inference.engine import Engine, Request
from llava_jax.inference.sampling import SamplingParams
from llava_jax.models.llava import LlavaConfig, image_token_count
from llava_jax.models.precision import PRECISIONS, compute_precision

DTYPES = ("auto", *PRECISIONS)

ImageSource = str | os.PathLike | bytes | Image.Image
History = Sequence[tuple[str, str]]


class Llava:
    """A LLaVA model with its tokenizer and conversation template, ready to answer.

        model = Llava.from_pretrained("runs/llava")
        model.chat("What color is the shape?", images=["shape.png"])
        model.generate(["What is this?", "And this?"], images=["a.png", "b.png"])

    Shapes are compiled on first use and reused: a first call is slow, the following are not.
    Wrong inputs raise LlavaError.

    Args:
      config: the model's dimensions.
      params: its parameters, a nested dict of arrays, on the devices to compute on.
      tokenizer: a Hugging Face fast tokenizer.
      template: name of the conversation template it was trained with.
      dtype: float32, mixed (float32 with bfloat16 products), bfloat16, or auto: what pays here.
    """

    def __init__(
        self, config: LlavaConfig, params: dict, tokenizer, template: str, dtype: str = "float32"
    ):
        self.config = config
        self.tokenizer = tokenizer
        self.template = get_template(template)
        self.dtype = check_dtype(dtype)
        self._tokenize = SegmentTokenizer(
            tokenizer, image_token_count(config), config.image_token_id, config.use_im_start_end
        )
        self.engine = Engine(config, params, dtype, self._stop_ids())

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike, dtype: str = "float32") -> "Llava":
        """Loads a work directory of train.py, one step of it, or a Hugging Face LLaVA folder."""
        from llava_jax.weights.run_directory import load_model

        loaded = load_model(path, compute_precision(check_dtype(dtype))[0].name)
        tokenizer = load_tokenizer(loaded.tokenizer_dir)
        return cls(loaded.config, loaded.params, tokenizer, loaded.template, dtype)

    def chat(
        self,
        question: str,
        images: Sequence[ImageSource] | ImageSource | None = None,
        history: History | None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> str:
        """One answer; arguments as in `stream_chat`."""
        pieces = self.stream_chat(
            question, images, history, max_new_tokens, temperature, top_p, seed
        )
        return "".join(pieces)

    def stream_chat(
        self,
        question: str,
        images: Sequence[ImageSource] | ImageSource | None = None,
        history: History | None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Iterator[str]:
        """One answer as pieces of text, each yielded as soon as it is sure.

        Args:
          question: the user's text.
          images: paths, encoded bytes or Pillow images, for all `<image>` of history and question
            in their order. Where none is written, they stand before the first turn.
          history: (question, answer) pairs that came before.
          max_new_tokens: the answer's length limit; it also ends where the model's positions do.
          temperature: 0 takes the likeliest token each time; otherwise tokens are drawn.
          top_p: draw only among the likeliest tokens that together reach this probability.
          seed: the same seed draws the same answer.
        """
        params = SamplingParams(max_new_tokens, temperature, top_p, seed)
        # Made here and not at the first piece, so the caller sees an error at the call.
        return self._stream(self.request(question, images, params, history or ()))

    def _stream(self, request: Request) -> Iterator[str]:
        answer = self._answer()
        for _ in self.engine.stream([request], [answer]):
            if piece := answer.take():
                yield piece
        if piece := answer.take(final=True):
            yield piece

    def generate(
        self,
        prompts: str | Sequence[str],
        images: Sequence | ImageSource | None = None,
        max_new_tokens: int = 32,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | Sequence[int] = 0,
        batch_size: int = 32,
    ) -> str | list[str]:
        """Answers single questions, many at a time, in the order given.

        Args:
          prompts: questions; a single str gives a single str.
          images: for each prompt None, one image or a list (path, encoded bytes, Pillow image).
            Where a prompt has no `<image>`, its images stand before it.
          max_new_tokens, temperature, top_p: as in `stream_chat`.
          seed: one for all prompts, or one a prompt. An answer depends on its prompt and its seed
            alone, so several draws for one prompt need several seeds.
          batch_size: most prompts computed at once.
        """
        if isinstance(prompts, str):
            images = None if images is None else [images]
            return self.generate(
                [prompts], images, max_new_tokens, temperature, top_p, seed, batch_size
            )[0]
        prompts = list(prompts)
        sources = self._sources(prompts, images)
        seeds = [seed] * len(prompts) if isinstance(seed, numbers.Integral) else list(seed)
        if len(seeds) != len(prompts):
            raise LlavaError(f"{len(seeds)} seeds for {len(prompts)} prompts: give one a prompt")
        if not isinstance(batch_size, numbers.Integral) or batch_size < 1:
            raise LlavaError(f"batch_size must be a whole number from 1, not {batch_size!r}")
        requests = []
        for i, prompt in enumerate(prompts):
            params = SamplingParams(max_new_tokens, temperature, top_p, seeds[i])
            requests.append(self.request(prompt, sources[i], params, where=f"prompt {i}: "))
        return self.answer(requests, batch_size)

    def answer(
        self,
        requests: Sequence[Request],
        batch_size: int,
        progress: Callable[[int], None] = lambda count: None,
    ) -> list[str]:
        """The answers to requests made by `request`, in their order.

        `progress` is called after each batch with the number of requests in it.
        """
        answers = [self._answer() for _ in requests]
        for count in self.engine.run(requests, answers, batch_size):
            progress(count)
        return [answer.text for answer in answers]

    def request(
        self,
        question: str,
        images: Sequence[ImageSource] | ImageSource | None,
        params: SamplingParams,
        history: History = (),
        where: str = "",
    ) -> Request:
        """A question as the model reads it; `where` begins the message of its errors."""
        with told_of(where):
            sources = as_sources(images)
            ids = self.prompt_ids(conversation(question, history), len(sources))
            load = (
                functools.partial(self._load_image, source, f"image {i}", where)
                for i, source in enumerate(sources)
            )
            request = Request(ids, tuple(load), params)
            self.engine.check(request)
        return request

    def logits(self, input_ids, pixel_values=None, attention_mask=None) -> jax.Array:
        """Float32 logits [B, T, V] for what a Hugging Face LLaVA processor returns.

        Args:
          input_ids: int[B, T], each image already `image_token_count` placeholder ids
            (`config.image_token_id`); NumPy, PyTorch or JAX.
          pixel_values: float[N, 3, S, S], normalised, in the order of their placeholders over the
            whole batch; or None.
          attention_mask: int[B, T], 0 for padding on either side; default no padding. Logits of
            padding mean nothing.
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
        self._check_vocabulary(input_ids)
        return self.engine.logits(input_ids, self._deal_images(input_ids, pixel_values), mask)

    def prompt_ids(self, turns: Sequence[Turn], images: int) -> np.ndarray:
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
        ids = self._tokenize(render(self.template, turns, generation=True)).input_ids
        self._check_vocabulary(ids[None])
        return ids

    def _stop_ids(self) -> list[int]:
        """The end-of-text token, and each stop text that is one token of its own."""
        ids = {self.tokenizer.eos_token_id}
        for stop in self.template.stop:
            ids.add(self.tokenizer.get_vocab().get(stop))
        return sorted(ids - {None})

    def _answer(self) -> Answer:
        return Answer(self.tokenizer, self.engine.stop_ids, self.template.stop)

    def _sources(self, prompts: Sequence[str], images) -> Sequence:
        """One entry a prompt."""
        if images is None:
            return [None] * len(prompts)
        if isinstance(images, ImageSource) or len(images) != len(prompts):
            count = 1 if isinstance(images, ImageSource) else len(images)
            raise LlavaError(
                f"{count} entries in images for {len(prompts)} prompts: give one entry a prompt "
                "(None, an image or a list of images)"
            )
        return images

    def _load_image(self, source: ImageSource, name: str, where: str) -> np.ndarray:
        """uint8[S, S, 3]; `where` begins the message of an error."""
        c = self.config
        if isinstance(source, str | os.PathLike):
            name = source = os.fspath(source)
        with told_of(where):
            image = load_image(source, name)
            return preprocess(image, c.image_size, c.image_mode, c.image_mean, name)

    def _check_vocabulary(self, input_ids: np.ndarray) -> None:
        vocabulary = self.config.decoder.vocab_size
        wrong = (input_ids < 0) | (input_ids >= vocabulary)
        wrong &= input_ids != self.config.image_token_id
        if wrong.any():
            row, column = np.argwhere(wrong)[0]
            raise LlavaError(
                f"token {column} of row {row} is {input_ids[row, column]}: the model's ids go from "
                f"0 to {vocabulary - 1}, and {self.config.image_token_id} stands for an image"
            )

    def _deal_images(self, input_ids: np.ndarray, pixel_values) -> list[np.ndarray]:
        """The flat list of images, float32[n, S, S, 3] for each row by its placeholders."""
        size, tokens = self.config.image_size, image_token_count(self.config)
        pixels = np.zeros((0, 3, size, size)) if pixel_values is None else to_numpy(pixel_values)
        if pixels.ndim != 4 or pixels.shape[1:] != (3, size, size):
            raise LlavaError(
                f"pixel_values must be [images, 3, {size}, {size}], not {list(pixels.shape)}"
            )
        placeholders = (input_ids == self.config.image_token_id).sum(axis=1)
        if placeholders.sum() != len(pixels) * tokens:
            raise LlavaError(
                f"input_ids have {placeholders.sum()} placeholders ({self.config.image_token_id}) "
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


def check_dtype(dtype: str) -> str:
    if dtype not in DTYPES:
        raise LlavaError(f"unknown dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
    return dtype


def conversation(question: str, history: History) -> list[Turn]:
    """Turns of the (question, answer) pairs of a history and of a last question."""
    turns = []
    for pair in history:
        if len(pair) != 2:
            raise LlavaError(f"history must hold (question, answer) pairs, not {pair!r:.80}")
        turns += [Turn("human", pair[0]), Turn("gpt", pair[1])]
    turns.append(Turn("human", question))
    for turn in turns:
        if not isinstance(turn.text, str):
            raise LlavaError(f"a question or answer must be text, not {turn.text!r:.80}")
    return turns


def as_sources(images) -> list[ImageSource]:
    """None, one image or several -> a list; LlavaError for anything that is no image source."""
    if images is None:
        return []
    images = images if isinstance(images, list | tuple) else [images]
    for image in images:
        if not isinstance(image, ImageSource):
            raise LlavaError(
                f"an image must be a path, encoded bytes or a Pillow image, "
                f"not {type(image).__name__}"
            )
    return list(images)


def to_numpy(array) -> np.ndarray:
    """NumPy from NumPy, JAX, a list, or a PyTorch tensor of any device, dtype and grad."""
    if hasattr(array, "detach"):
        array = array.detach().cpu()
        array = array.float() if array.is_floating_point() else array
    return np.asarray(array)


@contextlib.contextmanager
def told_of(where: str):
    """A LlavaError from inside begins with `where`."""
    try:
        yield
    except LlavaError as error:
        raise LlavaError(f"{where}{error}") from None
