"""A model class for lmms-eval that runs its tasks on our engine.

    python -m lmms_eval --model llava_jax --model_args pretrained=runs/llava --tasks pope

lmms-eval finds the classes through the entry point `lmms_eval.models`; no other module of this
package needs lmms-eval. It provides the questions and the metrics; the template of the prompt, the
preprocessing of pictures and the batching are ours. Start one process: the engine uses all devices.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from tqdm import tqdm

from llava_jax.data.video import Video
from llava_jax.errors import LlavaError
from llava_jax.inference.jobs import Request
from llava_jax.inference.model import Llava
from llava_jax.inference.sampling import SamplingParams
from llava_jax.serving.command_line import mesh_here
from llava_jax.text.conversation import IMAGE_TOKEN, MARKS, images_in

BATCHES_AT_A_TIME = 8  # their pictures are in memory together
FROM_LMMS_EVAL = {
    "device",
    "max_batch_size",
}  # passed to every model; JAX chooses its devices itself


def manifest() -> ModelManifest:
    """The target of the entry point."""
    return ModelManifest(
        model_id="llava_jax",
        simple_class_path=f"{__name__}.LlavaJaxSimple",
        chat_class_path=f"{__name__}.LlavaJax",
    )


class LlavaJax(lmms):
    """The chat model, lmms-eval's default: messages with pictures between their texts.

    Args:
      pretrained, dtype: see `Llava.from_pretrained`.
      batch_size: the largest number of questions in one batch.
      use_until: end answers at the task's `until` texts. By default they are ignored, as in
        lmms-eval's own LLaVA: every task has a blank line among them.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        dtype: str = "auto",
        batch_size: int | str = 32,
        use_until: bool = False,
        **others,
    ):
        super().__init__()
        if unknown := sorted(set(others) - FROM_LMMS_EVAL):
            raise LlavaError(
                f"unknown model_args {', '.join(unknown)}: known are pretrained, dtype, "
                "batch_size, use_until"
            )
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise LlavaError(f"batch_size must be a whole number from 1, not {batch_size!r}")
        self.model = Llava.from_pretrained(pretrained, dtype=dtype, mesh=mesh_here())
        self.batch_size = int(batch_size)
        self.use_until = use_until

    def generate_until(self, requests: Sequence) -> list[GenerationResult]:
        """Answers in the order of the requests, stored in lmms-eval's cache window by window."""
        results, window = [], BATCHES_AT_A_TIME * self.batch_size
        with tqdm(total=len(requests), unit="question", desc="llava_jax") as bar:
            for start in range(0, len(requests), window):
                part = [instance.args for instance in requests[start : start + window]]
                asked = [self._request(*args, seed=start + i) for i, args in enumerate(part)]
                texts = self.model.answer(asked, self.batch_size, bar.update)
                for args, request, text in zip(part, asked, texts, strict=True):
                    self.cache_hook.add_partial("generate_until", args[:2], text)
                    counts = TokenCounts(input_tokens=len(request.input_ids))
                    results.append(GenerationResult(text, counts))
        return results

    def _request(
        self,
        context: str,
        doc_to_messages: Callable[[Any], list[dict]],
        settings: Mapping,
        doc_id: Any,
        task: str,
        split: str,
        seed: int,
    ) -> Request:
        messages = doc_to_messages(self.task_dict[task][split][doc_id])
        *history, (question, answer), images = read_messages(messages)
        if answer:
            raise LlavaError(f"{task}, {doc_id}: the last message must be the user's")
        params = self._sampling(settings, seed)
        where = f"{task}, {doc_id}: "
        return self.model.request(question, images, params, history, where=where)

    def _sampling(self, settings: Mapping, seed: int) -> SamplingParams:
        """A task's generation_kwargs as SamplingParams; keys about a model's input are ignored."""
        if settings.get("num_beams") not in (None, 1):
            raise LlavaError(f"there is no beam search: num_beams is {settings['num_beams']}")
        drawn = settings.get("do_sample", True)
        until = settings.get("until") or ()
        return SamplingParams(
            settings.get("max_new_tokens") or 1024,
            temperature=(settings.get("temperature") or 0.0) if drawn else 0.0,
            top_p=settings.get("top_p") or 1.0,
            seed=seed,
            stop=until if self.use_until else (),
        )

    def loglikelihood(self, requests):
        raise NotImplementedError("llava_jax answers generate_until tasks; not loglikelihood")

    def generate_until_multi_round(self, requests):
        raise NotImplementedError("llava_jax answers generate_until tasks; not multi-round ones")


class LlavaJaxSimple(LlavaJax):
    """The simple model (`--force_simple`): pictures, or paths of videos, followed by one text."""

    is_simple = True

    def _request(
        self,
        context: str,
        settings: Mapping,
        doc_to_visual: Callable[[Any], Sequence],
        doc_id: Any,
        task: str,
        split: str,
        seed: int,
    ) -> Request:
        images = list(doc_to_visual(self.task_dict[task][split][doc_id]) or ())
        images = [Video(image) if isinstance(image, str) else image for image in images]
        if images_in(context) != len(images):
            context = MARKS.sub("", context)
        params = self._sampling(settings, seed)
        return self.model.request(context, images, params, where=f"{task}, {doc_id}: ")


def read_messages(messages: Sequence[Mapping]) -> list:
    """Chat messages -> [(question, answer) pairs..., the list of pictures and videos].

    The last pair's answer is empty if its question is still open. A system message is put before
    the first question, since the template has its own system text.
    """
    pairs, images, system = [], [], ""
    for message in messages:
        text = ""
        for item in message["content"]:
            if item["type"] == "image":
                images.append(item["url"])
                text += f"{IMAGE_TOKEN}\n"
            elif item["type"] == "video":
                if item.get("start_time") is not None or item.get("end_time") is not None:
                    raise LlavaError("a message shows a part of a video: only whole ones are shown")
                images.append(Video(item["url"]))
                text += f"{IMAGE_TOKEN}\n"
            elif item["type"] == "text":
                text += MARKS.sub("", item["text"])
            else:
                raise LlavaError(
                    f"a message contains {item['type']}: LLaVA reads text, pictures and videos"
                )
        if message["role"] == "system":
            system += f"{text}\n"
        elif message["role"] == "user":
            pairs.append((system + text, ""))
            system = ""
        elif pairs:
            pairs[-1] = (pairs[-1][0], text)
        else:
            raise LlavaError("the first message is an answer: a user's message must come first")
    if not pairs:
        raise LlavaError("no message is from the user")
    return [*pairs, images]
