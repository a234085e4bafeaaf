"""`Llava`: a model to ask, from Python.

B rows, T length, N pictures in all, S side of a tile, V vocabulary.
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

from llava_jax.data.boxes import Boxes
from llava_jax.errors import LlavaError
from llava_jax.inference.answer import Answer
from llava_jax.inference.distortion import with_twin
from llava_jax.inference.engine import Engine
from llava_jax.inference.explain import Explanation, explain
from llava_jax.inference.jobs import Job, Picture, Request, limited
from llava_jax.inference.lookup import check_lookup
from llava_jax.inference.pictures import ImageSource, PictureReader, deal_sources
from llava_jax.inference.placement import copies, copy_params, fast_form, load_params
from llava_jax.inference.processor_inputs import read_inputs
from llava_jax.inference.prompts import History, PromptReader, conversation, error_prefix
from llava_jax.inference.replicas import Replicas
from llava_jax.inference.sampling import SamplingParams
from llava_jax.models.llava import LlavaConfig
from llava_jax.models.precision import check_dtype, compute_precision
from llava_jax.models.quantization import check_form
from llava_jax.text.conversation import Turn
from llava_jax.text.templates import get_template
from llava_jax.text.tokenizer import load_tokenizer


class Llava:
    """A LLaVA model with its tokenizer and conversation template, ready to answer.

        model = Llava.from_pretrained("runs/llava")
        model.chat("What color is the shape?", images=["shape.png"])
        model.generate(["What is this?", "And this?"], images=["a.png", "b.png"])

    A shape is compiled on first use: a first call is slow. Wrong inputs raise LlavaError.

    Args:
      config: the model's dimensions.
      params: its parameters, a nested dict of arrays, on the devices to compute on.
      tokenizer: a Hugging Face fast tokenizer.
      template: name of the conversation template it was trained with.
      dtype: float32, mixed (float32 with bfloat16 products), bfloat16, or auto, the fastest here.
      quantize: int8 keeps the kernels of the language model in eight bits, with a scale for each
        channel, int4 in four, with a scale for each 32 inputs of one; None as they are.
      kv_cache: int8 keeps keys and values in eight bits, with a scale for each token and head;
        None in dtype.
      lookup: tokens to guess at a time where answers repeat (see lookup.py), or 0, which is off.
      cache_tokens: in memory at a time, of a copy; default: as many as requests may need.
      allow_urls: images may be http(s) addresses.
      chat_template: of a Hugging Face processor, used instead of `template`; answers still end at
        the `stop` texts of `template`.
      stop_token_ids: tokens that end an answer, besides those of tokenizer and template.
      box_convention: how it writes boxes; `boxes` reads them from its answers.
      mesh: of several devices (`llava_jax.parallel.mesh.make_mesh`). Its data axis counts the
        copies of the model, which share the requests; each is spread over fsdp and tensor.
    """

    def __init__(
        self,
        config: LlavaConfig,
        params: dict,
        tokenizer,
        template: str,
        *,
        dtype: str = "float32",
        quantize: str | None = None,
        kv_cache: str | None = None,
        lookup: int = 0,
        cache_tokens: int | None = None,
        allow_urls: bool = False,
        chat_template: str | None = None,
        stop_token_ids: Sequence[int] = (),
        box_convention: str = "llava",
        mesh: Mesh | None = None,
    ):
        self.config = config
        self.tokenizer = tokenizer
        self.template = get_template(template)
        self.boxes = Boxes(box_convention, config.image)
        self.dtype = check_dtype(dtype)
        vocabulary = tokenizer.get_vocab()
        ends = {vocabulary.get(stop) for stop in self.template.stop}  # those that are one token
        ends |= {tokenizer.eos_token_id, *stop_token_ids}
        self._ends = tuple(sorted(ends - {None}))
        self._prompts = PromptReader(config, tokenizer, self.template, chat_template)
        self._pictures = PictureReader(config, allow_urls)
        check_form(quantize, "quantize")
        if kv_cache not in (None, "int8"):
            raise LlavaError(f"kv_cache must be int8 or None, not {kv_cache!r}")
        self._cache_tokens = cache_tokens
        self._copied = functools.partial(copy_params, config, quantize=quantize)
        self._parts = copies(mesh)
        engine = functools.partial(
            Engine, config, dtype=dtype, kv_dtype=kv_cache, lookup=lookup, cache_tokens=cache_tokens
        )
        engines = [engine(self._copied(params, part=part), mesh=part) for part in self._parts]
        self.engine = engines[0] if len(engines) == 1 else Replicas(engines)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike,
        *,
        dtype: str = "float32",
        template: str | None = None,
        quantize: str | None = None,
        kv_cache: str | None = None,
        lookup: int = 0,
        cache_tokens: int | None = None,
        allow_urls: bool = False,
        mesh: Mesh | None = None,
        **options,
    ) -> "Llava":
        """Loads a work directory of train.py, one step of it, or a LLaVA folder of any form.

        Args:
          template: name of a conversation template, or of a chat template that the folder names, to
            use instead of the folder's own words.
          options: of `open_llava`, for a folder that train.py did not write.
        """
        from llava_jax.weights.load import load_model

        check_lookup(lookup)
        stored = compute_precision(check_dtype(dtype))[0].name
        check_form(quantize, "quantize")
        place = functools.partial(load_params, mesh=mesh, dtype=stored, quantize=quantize)
        loaded = load_model(path, stored, place, template, **options)
        rows = loaded.config.decoder.vocab_size
        return cls(
            loaded.config,
            fast_form(loaded.params, dtype, mesh),
            load_tokenizer(loaded.tokenizer_dir, rows, loaded.added_tokens),
            loaded.template,
            dtype=dtype,
            quantize=quantize,
            kv_cache=kv_cache,
            lookup=lookup,
            cache_tokens=cache_tokens,
            allow_urls=allow_urls,
            chat_template=loaded.chat_template,
            stop_token_ids=loaded.stop_token_ids,
            box_convention=loaded.box_convention,
            mesh=mesh,
        )

    def replace_params(self, params: dict) -> None:
        """Answers with other parameters of the same shapes from now on."""
        engines = self.engine.engines if isinstance(self.engine, Replicas) else [self.engine]
        for engine, part in zip(engines, self._parts, strict=True):
            engine.params = self._copied(params, part=part)

    def chat(
        self,
        question: str,
        images: Sequence[ImageSource] | ImageSource | None = None,
        history: History | None = None,
        system: str | None = None,
        **sampling,
    ) -> str:
        """One answer; arguments as in `stream_chat`."""
        return "".join(self.stream_chat(question, images, history, system, **sampling))

    def stream_chat(
        self,
        question: str,
        images: Sequence[ImageSource] | ImageSource | None = None,
        history: History | None = None,
        system: str | None = None,
        **sampling,
    ) -> Iterator[str]:
        """One answer as pieces of text, each yielded as soon as it is certain.

        Args:
          question: the user's text.
          images: paths, encoded bytes, Pillow images, videos (`llava_jax.Video`, or paths of video
            files), for all `<image>` and `<video>` in their order. Without any they stand first.
          history: (question, answer) pairs that came before. The part of them that the engine read
            for the last answer is not computed again.
          system: a system prompt to use instead of the template's own.
          sampling: as in `SamplingParams`, by vLLM's or Hugging Face's names, except `n`.
        """
        params = SamplingParams.from_names(sampling)
        if params.n != 1:
            raise LlavaError("a chat has one answer: for several give n to generate")
        # Made here and not at the first piece, so the caller sees an error at the call.
        request = self.request(question, images, params, history or (), system)
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
          images: for each prompt None, one image or video or a list of them, as in `stream_chat`.
            If a prompt has no `<image>`, its images stand before it.
          batch_size: the most prompts that are computed at once; one with contrast counts twice.
          sampling: as in `SamplingParams`, by vLLM's or Hugging Face's names. `seed` is one number,
            or one for each prompt: an answer depends on its prompt and its seed alone.

        Returns:
          One text for each prompt; with n over 1, a list of n texts for each.
        """
        if isinstance(prompts, str):
            images = None if images is None else [images]
            return self.generate([prompts], images, batch_size, **sampling)[0]
        answers = self.complete(prompts, images, batch_size, **sampling)
        texts = [[answer.text for answer in of_prompt] for of_prompt in answers]
        several = sampling.get("n", sampling.get("num_return_sequences", 1)) > 1
        return texts if several else [text for (text,) in texts]

    def complete(
        self,
        prompts: Sequence[str],
        images: Sequence | None = None,
        batch_size: int = 32,
        **sampling,
    ) -> list[list[Answer]]:
        """Like `generate`, but n `Answer`s a prompt, with tokens, log probabilities and reasons."""
        return self.answers(self._requests(prompts, images, batch_size, sampling), batch_size)

    def stream(
        self,
        prompts: Sequence[str],
        images: Sequence | None = None,
        batch_size: int = 32,
        **sampling,
    ) -> Iterator[tuple[int, str]]:
        """Like `generate`, but yields (number of the prompt, piece of text) once it is certain."""
        requests = self._requests(prompts, images, batch_size, sampling)
        if any(request.params.n != 1 for request in requests):
            raise LlavaError("a stream has one answer a prompt: for several give n to generate")
        return self._stream(requests, batch_size)

    def _stream(self, requests: Sequence[Request], batch_size: int) -> Iterator[tuple[int, str]]:
        jobs = [self.jobs(request)[0] for request in requests]
        numbers = {id(job.answer): number for number, job in enumerate(jobs)}
        for answer in self._run(jobs, batch_size):
            if piece := answer.take(final=answer.done):
                yield numbers[id(answer)], piece

    def _requests(self, prompts, images, batch_size: int, sampling: dict) -> list[Request]:
        if isinstance(prompts, str | bytes | Mapping) or not isinstance(prompts, Iterable):
            raise LlavaError(f"prompts must be a list of texts, not {type(prompts).__name__}")
        prompts = list(prompts)
        sources = deal_sources(images, len(prompts))
        seeds = sampling.pop("seed", 0)
        params = SamplingParams.from_names(sampling)
        seeds = [seeds] * len(prompts) if np.ndim(seeds) == 0 else seeds
        if len(seeds) != len(prompts):
            raise LlavaError(f"{len(seeds)} seeds for {len(prompts)} prompts: give one a prompt")
        if not isinstance(batch_size, numbers.Integral) or batch_size < 1:
            raise LlavaError(f"batch_size must be a whole number from 1, not {batch_size!r}")
        of_each = (dataclasses.replace(params, seed=seed) for seed in seeds)
        each = enumerate(zip(prompts, sources, of_each, strict=True))
        return [self.request(*asked, where=f"prompt {i}: ") for i, asked in each]

    def explain(self, questions, images, answers=None, **options) -> Explanation | list:
        """Where it looked on a picture; arguments and result as in `explain.explain`."""
        return explain(self, questions, images, answers, **options)

    def answer(
        self,
        requests: Sequence[Request],
        batch_size: int,
        progress: Callable[[int], None] = lambda count: None,
    ) -> list[str]:
        """The text for each request made by `request`, in their order; see `answers`."""
        return [answers[0].text for answers in self.answers(requests, batch_size, progress)]

    def answers(
        self,
        requests: Sequence[Request],
        batch_size: int,
        progress: Callable[[int], None] = lambda count: None,
    ) -> list[list[Answer]]:
        """The n answers to each request made by `request`, in their order.

        `progress` is called with the number of answers completed since its last call.
        """
        groups = [self.jobs(request) for request in requests]
        for answer in self._run(list(itertools.chain(*groups)), batch_size):
            if answer.done:
                progress(1)
        return [[job.answer for job in jobs] for jobs in groups]

    def _run(self, jobs: Sequence[Job], batch_size: int) -> Iterator[Answer]:
        at_once = min(batch_size, sum(len(job.readings) for job in jobs))
        # A batch that is set up serves fewer requests too: another size would be compiled.
        if at_once < self.engine.rows <= batch_size:
            at_once = self.engine.rows
        for answer in self.engine.run(jobs, at_once):
            if answer.error:
                raise answer.error
            yield answer

    def request(
        self,
        question: str,
        images: Sequence[ImageSource] | ImageSource | None,
        params: SamplingParams,
        history: History = (),
        system: str | None = None,
        where: str = "",
    ) -> Request:
        """A question as the model reads it; `where` begins the message of its errors."""
        with error_prefix(where):
            turns = conversation(question, history)
            pictures = self._pictures.pictures(images, where)
            return self._prompts.request(turns, pictures, system, params, self._stops(params))

    def conversation_request(
        self,
        turns: Sequence[Turn],
        pictures: Sequence[Picture],
        params: SamplingParams,
        system: str | None = None,
    ) -> Request:
        """A conversation whose last turn is to be answered.

        Args:
          pictures: one for each `<image>` of the turns, from `picture`.
          system: a system prompt to use instead of the template's own.
        """
        return self._prompts.request(turns, tuple(pictures), system, params, self._stops(params))

    def text_request(self, text: str, params: SamplingParams) -> Request:
        """A text that is to be continued as it is, without a template."""
        return self._prompts.text_request(text, params, self._stops(params))

    def traced(self, request: Request, answer: str) -> Request:
        """A request with its answer, which is traced: nothing is generated."""
        return self._prompts.traced(request, answer)

    def picture(
        self, source: ImageSource, name: str = "image", where: str = "", several: bool = False
    ) -> Picture:
        """A picture of a request, of which it is one of `several`; `where` begins its errors."""
        with error_prefix(where):
            return self._pictures.picture(source, name, where, several)

    @property
    def takes_system(self) -> bool:
        """Whether the template has a place for a system prompt."""
        return self._prompts.takes_system

    def prompt_ids(self, turns: Sequence[Turn], images: int = 0) -> np.ndarray:
        """int32[T]: a conversation that waits for an answer, with `images` square pictures."""
        layouts = self.config.layouts([(self.config.image.size,) * 2] * images)
        return self._prompts.ids(turns, [len(layout) for layout in layouts])

    def jobs(self, request: Request) -> list[Job]:
        """What `Engine.run` takes: the n answers to a request, drawn with n seeds."""
        params = request.params
        texts = () if params.ignore_eos else self.template.stop
        stops = self._stops(params)
        room = self.config.decoder.max_position_embeddings - len(request.input_ids)
        jobs = []
        for i in range(params.n):
            draw = dataclasses.replace(params, n=1, seed=(params.seed + i) % 2**32)
            answer = Answer(self.tokenizer, stops, (*texts, *params.stop), params.min_tokens)
            one = dataclasses.replace(request, params=draw)
            job = Job(one, answer, stops, min(params.max_tokens, room))
            jobs.append(limited(with_twin(job, self.config), self._cache_tokens))
        return jobs

    def logits(self, input_ids, pixel_values=None, attention_mask=None, **others) -> jax.Array:
        """Float32 logits [B, T, V] for what a Hugging Face processor of the family returns.

        Arguments as in `read_inputs`. The logits of padding mean nothing.
        """
        inputs = read_inputs(self.config, input_ids, pixel_values, attention_mask, **others)
        return self.engine.logits(*inputs)

    def _stops(self, params: SamplingParams) -> tuple[int, ...]:
        """The tokens that end one answer."""
        own = () if params.ignore_eos else self._ends
        return tuple(sorted({*own, *params.stop_token_ids}))

    def describe_stops(self) -> str:
        """The tokens and texts that end an answer, for people to read."""
        names = self.tokenizer.convert_ids_to_tokens(list(self._ends))
        texts = [repr(text) for text in self.template.stop if text not in names]
        return ", ".join([*names, *texts])
