"""`Llava`: a model to ask, from Python.

B rows, T length, N images in all, S image side, V vocabulary.
"""

import dataclasses
import functools
import itertools
import numbers
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from llava_jax.data.media import load_image, preprocess
from llava_jax.errors import LlavaError
from llava_jax.inference.answer import Answer
from llava_jax.inference.engine import Engine, Request
from llava_jax.inference.placement import copies, copy_params, place_params
from llava_jax.inference.processor_inputs import read_inputs
from llava_jax.inference.prompts import History, PromptReader, conversation, told_of
from llava_jax.inference.quantization import pack_kernels, quantize_kernels
from llava_jax.inference.replicas import Replicas
from llava_jax.inference.sampling import SamplingParams
from llava_jax.inference.sources import ImageSource, as_sources, fetch, file_version, source_name
from llava_jax.models.decoder import separate_layers
from llava_jax.models.llava import LlavaConfig
from llava_jax.models.precision import PRECISIONS, compute_precision
from llava_jax.text.templates import get_template
from llava_jax.text.tokenizer import load_tokenizer

DTYPES = ("auto", *PRECISIONS)


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
      weights: int8 keeps the language model's kernels in eight bits, a scale a channel; None as
        they are.
      kv_cache: int8 keeps keys and values in eight bits, a scale a token and head; None in dtype.
      allow_urls: images may be http(s) addresses.
      chat_template: a Hugging Face processor's, to be followed in place of `template`; the latter
        still tells where answers end.
      mesh: of several devices (`llava_jax.parallel.mesh.make_mesh`): as many copies of the model as
        its data axis is long share the requests, and each is spread over fsdp and tensor.
    """

    def __init__(
        self,
        config: LlavaConfig,
        params: dict,
        tokenizer,
        template: str,
        dtype: str = "float32",
        weights: str | None = None,
        kv_cache: str | None = None,
        allow_urls: bool = False,
        chat_template: str | None = None,
        mesh: Mesh | None = None,
    ):
        self.config = config
        self.tokenizer = tokenizer
        self.template = get_template(template)
        self.dtype = check_dtype(dtype)
        self.allow_urls = allow_urls
        self.prompt_ids = PromptReader(config, tokenizer, self.template, chat_template)
        for name, value in (("weights", weights), ("kv_cache", kv_cache)):
            if value not in (None, "int8"):
                raise LlavaError(f"{name} must be int8 or None, not {value!r}")
        engines = []
        for part in copies(mesh) if mesh else [None]:
            held = copy_params(config, params, part) if part else params
            held = quantize_kernels(held) if weights else held
            engines.append(Engine(config, held, dtype, self._stop_ids(), kv_cache, part))
        self.engine = engines[0] if len(engines) == 1 else Replicas(engines)
        # Many questions about a picture follow each other: it is decoded once.
        self._read_file = functools.lru_cache(4)(lambda path, _, name: self._prepare(path, name))

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike,
        dtype: str = "float32",
        weights: str | None = None,
        kv_cache: str | None = None,
        allow_urls: bool = False,
        mesh: Mesh | None = None,
        **options,
    ) -> "Llava":
        """Loads a work directory of train.py, one step of it, or a LLaVA folder of others.

        options: of `weights.load.open_llava`, for a folder of others.
        """
        from llava_jax.weights.run_directory import load_model

        stored = compute_precision(check_dtype(dtype))[0].name
        first = mesh and copies(mesh)[0]  # the others are given theirs by it
        place = mesh and functools.partial(place_params, mesh=first, dtype=stored)
        loaded = load_model(path, stored, place, **options)
        rows = loaded.config.decoder.vocab_size
        tokenizer = load_tokenizer(loaded.tokenizer_dir, rows, loaded.added_tokens)
        params = loaded.params
        arrays, products = compute_precision(dtype)
        if jax.default_backend() == "cpu" and (mesh is None or first.size == 1):
            params = {**params, "decoder": separate_layers(params["decoder"])}
            if weights is None and "bfloat16" in (arrays.name, products):
                params = pack_kernels(params)
        return cls(
            loaded.config,
            params,
            tokenizer,
            loaded.template,
            dtype,
            weights,
            kv_cache,
            allow_urls,
            loaded.chat_template,
            mesh,
        )

    def chat(
        self,
        question: str,
        images: Sequence[ImageSource] | ImageSource | None = None,
        history: History | None = None,
        **sampling,
    ) -> str:
        """One answer; arguments as in `stream_chat`."""
        return "".join(self.stream_chat(question, images, history, **sampling))

    def stream_chat(
        self,
        question: str,
        images: Sequence[ImageSource] | ImageSource | None = None,
        history: History | None = None,
        **sampling,
    ) -> Iterator[str]:
        """One answer as pieces of text, each yielded as soon as it is sure.

        Args:
          question: the user's text.
          images: paths, encoded bytes or Pillow images, for all `<image>` of history and question
            in their order. Where none is written, they stand before the first turn.
          history: (question, answer) pairs that came before; what the engine read of them for the
            last answer is not read again.
          sampling: as in `SamplingParams`, by vLLM's or Hugging Face's names, but `n`.
        """
        params = SamplingParams.from_names(sampling)
        if params.n != 1:
            raise LlavaError("a chat has one answer: for several give n to generate")
        # Made here and not at the first piece, so the caller sees an error at the call.
        request = self.request(question, images, params, history or ())
        return (piece for _, piece in self._stream([request], 1))

    def generate(
        self,
        prompts: str | Sequence[str],
        images: Sequence | ImageSource | None = None,
        batch_size: int = 32,
        **sampling,
    ) -> str | list[str] | list[list[str]]:
        """Answers single questions, many at a time, in the order given.

        Args:
          prompts: questions; a single str gives a single result.
          images: for each prompt None, one image or a list (path, encoded bytes, Pillow image).
            Where a prompt has no `<image>`, its images stand before it.
          batch_size: most prompts computed at once.
          sampling: as in `SamplingParams`, by vLLM's or Hugging Face's names. `seed` may be one for
            all or one a prompt: an answer depends on its prompt and its seed alone.

        Returns:
          A text a prompt; with n over 1 a list of n texts.
        """
        if isinstance(prompts, str):
            images = None if images is None else [images]
            return self.generate([prompts], images, batch_size, **sampling)[0]
        answers = self.complete(prompts, images, batch_size, **sampling)
        texts = [[answer.text for answer in of_prompt] for of_prompt in answers]
        return (
            texts
            if sampling.get("n", sampling.get("num_return_sequences", 1)) > 1
            else [text for (text,) in texts]
        )

    def complete(
        self,
        prompts: Sequence[str],
        images: Sequence | None = None,
        batch_size: int = 32,
        **sampling,
    ) -> list[list[Answer]]:
        """As `generate`, but n `Answer`s a prompt, with tokens, log probabilities and reasons."""
        return self.answers(self._requests(prompts, images, batch_size, sampling), batch_size)

    def stream(
        self,
        prompts: Sequence[str],
        images: Sequence | None = None,
        batch_size: int = 32,
        **sampling,
    ) -> Iterator[tuple[int, str]]:
        """As `generate`, but (number of the prompt, piece of its text) as soon as it is sure."""
        requests = self._requests(prompts, images, batch_size, sampling)
        if any(request.params.n != 1 for request in requests):
            raise LlavaError("a stream has one answer a prompt: for several give n to generate")
        return self._stream(requests, batch_size)

    def _stream(self, requests: Sequence[Request], batch_size: int) -> Iterator[tuple[int, str]]:
        entries = [self.entries(request)[0] for request in requests]
        numbers = {id(answer): number for number, (_, answer) in enumerate(entries)}
        for answer in self._run(entries, batch_size):
            if piece := answer.take(final=answer.done):
                yield numbers[id(answer)], piece

    def _requests(self, prompts, images, batch_size: int, sampling: dict) -> list[Request]:
        if isinstance(prompts, str | bytes | Mapping) or not isinstance(prompts, Iterable):
            raise LlavaError(f"prompts must be a list of texts, not {type(prompts).__name__}")
        prompts = list(prompts)
        sources = self._sources(prompts, images)
        seeds = sampling.pop("seed", 0)
        params = SamplingParams.from_names(sampling)
        if np.ndim(seeds) == 0:
            seeds = [seeds] * len(prompts)
        if len(seeds) != len(prompts):
            raise LlavaError(f"{len(seeds)} seeds for {len(prompts)} prompts: give one a prompt")
        if not isinstance(batch_size, numbers.Integral) or batch_size < 1:
            raise LlavaError(f"batch_size must be a whole number from 1, not {batch_size!r}")
        requests = []
        for i, prompt in enumerate(prompts):
            of_prompt = dataclasses.replace(params, seed=seeds[i])
            requests.append(self.request(prompt, sources[i], of_prompt, where=f"prompt {i}: "))
        return requests

    def answer(
        self,
        requests: Sequence[Request],
        batch_size: int,
        progress: Callable[[int], None] = lambda count: None,
    ) -> list[str]:
        """The text for each request made by `request`, in their order; `progress` as below."""
        return [answers[0].text for answers in self.answers(requests, batch_size, progress)]

    def answers(
        self,
        requests: Sequence[Request],
        batch_size: int,
        progress: Callable[[int], None] = lambda count: None,
    ) -> list[list[Answer]]:
        """The n answers to each request made by `request`, in their order.

        `progress` is called with a number of answers that are done since its last call.
        """
        groups = [self.entries(request) for request in requests]
        for answer in self._run(list(itertools.chain(*groups)), batch_size):
            if answer.done:
                progress(1)
        return [[answer for _, answer in entries] for entries in groups]

    def _run(self, entries: Sequence[tuple[Request, Answer]], batch_size: int) -> Iterator[Answer]:
        at_once = min(batch_size, len(entries))
        # A batch that is set up serves fewer requests too: another size would be compiled.
        if at_once < self.engine.rows <= batch_size:
            at_once = self.engine.rows
        for answer in self.engine.run(entries, at_once):
            if answer.error:
                raise answer.error
            yield answer

    def entries(self, request: Request) -> list[tuple[Request, Answer]]:
        """What `Engine.run` takes: the request and its answer, once for each of its n draws."""
        params = request.params
        texts = () if params.ignore_eos else self.template.stop
        entries = []
        for i in range(params.n):
            draw = dataclasses.replace(params, n=1, seed=(params.seed + i) % 2**32)
            answer = Answer(
                self.tokenizer, self.engine.stops(params), (*texts, *params.stop), params.min_tokens
            )
            entries.append((dataclasses.replace(request, params=draw), answer))
        return entries

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
            request = Request(ids, tuple(load), params, tuple(map(_identity, sources)))
            self.engine.check(request)
        return request

    def logits(self, input_ids, pixel_values=None, attention_mask=None) -> jax.Array:
        """Float32 logits [B, T, V] for what a Hugging Face LLaVA processor returns.

        Args:
          input_ids: int[B, T], each image already as many placeholder ids
            (`config.image_token_id`) as its layout has tokens; NumPy, PyTorch or JAX.
          pixel_values: float[N, 3, S, S], normalised, in the order of their placeholders over the
            whole batch; or None.
          attention_mask: int[B, T], 0 for padding on either side; default no padding. Logits of
            padding mean nothing.
        """
        return self.engine.logits(
            *read_inputs(self.config, input_ids, pixel_values, attention_mask)
        )

    def _stop_ids(self) -> list[int]:
        """The end-of-text token, and each stop text that is one token of its own."""
        ids = {self.tokenizer.eos_token_id}
        for stop in self.template.stop:
            ids.add(self.tokenizer.get_vocab().get(stop))
        return sorted(ids - {None})

    def _sources(self, prompts: Sequence[str], images) -> Sequence:
        """One entry a prompt."""
        if images is None:
            return [None] * len(prompts)
        wanted = "give one entry a prompt (None, an image or a list of images)"
        if isinstance(images, ImageSource | Mapping) or not isinstance(images, Iterable):
            raise LlavaError(f"images must be a list, not {type(images).__name__}: {wanted}")
        images = list(images)
        if len(images) != len(prompts):
            raise LlavaError(
                f"{len(images)} entries in images for {len(prompts)} prompts: {wanted}"
            )
        return images

    def _load_image(self, source: ImageSource, name: str, where: str) -> np.ndarray:
        """uint8[S, S, 3]; `where` begins the message of an error."""
        name = source_name(source, name)
        with told_of(where):
            found = fetch(source, self.allow_urls)
            if isinstance(found, str):
                return self._read_file(found, file_version(found, name), name)
            return self._prepare(found, name)

    def _prepare(self, image: str | bytes | Image.Image, name: str) -> np.ndarray:
        (tile,) = preprocess(load_image(image, name), self.config.image, name)
        return tile


def _identity(source: ImageSource):
    """What is equal for sources that are the same."""
    return id(source) if isinstance(source, Image.Image) else source


def check_dtype(dtype: str) -> str:
    if dtype not in DTYPES:
        raise LlavaError(f"unknown dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
    return dtype
