"""`llava-jax generate`: a file of requests to a file of answers, resumed where it ended.

A line of requests is a JSON object with `prompt`, and where wanted `id`, `images` (a path below
`--image_root`, a data: address or, when allowed, an http one; one or a list), `history` (a list of
[question, answer]) and any sampling parameter by vLLM's or Hugging Face's name. Its answer is a
line in the same place: `id`, `text`, `finish_reason`, token counts; with n over 1 `texts`, with
log probabilities `logprobs`; or `id` and `error`.
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from llava_jax.data.addresses import is_address
from llava_jax.errors import LlavaError
from llava_jax.files import json_line
from llava_jax.inference.answer import Answer
from llava_jax.inference.fingerprint import weights_fingerprint
from llava_jax.inference.model import Llava
from llava_jax.inference.sampling import SamplingParams
from llava_jax.serving.answer_file import answer_line, open_answers
from llava_jax.serving.command_line import add_model_arguments, load_from_arguments

OWN_KEYS = {"id", "prompt", "images", "history"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--input", required=True, metavar="FILE", help="requests, JSON lines")
    parser.add_argument("--output", required=True, metavar="FILE", help="answers, JSON lines")
    parser.add_argument("--image_root", default="", metavar="DIR", help="default: beside --input")
    parser.add_argument("--batch_size", type=int, default=32, metavar="N", help="requests at once")
    parser.add_argument(
        "--sampling",
        type=_json_object,
        default={},
        metavar="JSON",
        help="""for requests that do not say otherwise, such as '{"max_tokens": 64}'""",
    )
    parser.add_argument("--overwrite", action="store_true", help="drop answers of another run")


def _json_object(text: str) -> dict:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object of sampling parameters")
    return value


def main(args: argparse.Namespace) -> int:
    """Answers every request that has no answer yet; returns the exit code."""
    check_arguments(args)
    with open(args.input, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
        total = sum(1 for _ in file)
    model = load_from_arguments(args)
    run = {
        "input": digest,
        "parameters": weights_fingerprint(model.engine.params, model.dtype),
        "template": model.template.name,
        "sampling": args.sampling,
        "dtype": args.dtype,
        "weights": args.weights,
        "kv_cache": args.kv_cache,
    }
    root = Path(args.image_root) if args.image_root else Path(args.input).parent
    output, done = open_answers(Path(args.output), run, args.overwrite)
    start, wrong = time.perf_counter(), 0
    with output, tqdm(total=total, initial=done, unit="request", desc="generate") as bar:
        requests = Requests(args.input, done, model, root, args.sampling)
        for line in answer_lines(model, requests, args.batch_size):
            output.write(json_line(line))
            output.flush()
            wrong += "error" in line
            bar.update()
    report(model, time.perf_counter() - start, wrong)
    return 0


def check_arguments(args: argparse.Namespace) -> None:
    """LlavaError for what can be told before a model is loaded."""
    if not Path(args.input).is_file():
        raise LlavaError(f"no file of requests at {args.input}")
    if Path(args.output).exists() and Path(args.output).samefile(args.input):
        raise LlavaError(f"--output is the file of requests, {args.input}: give another")
    if Path(args.output).is_dir():
        raise LlavaError(f"--output is a folder, {args.output}: give a file")
    if args.image_root and not Path(args.image_root).is_dir():
        raise LlavaError(f"no folder of images at {args.image_root}")
    if args.batch_size < 1:
        raise LlavaError(f"--batch_size must be at least 1, not {args.batch_size}")
    SamplingParams.from_names(args.sampling)


class Requests:
    """The requests of a file from one line on, as `Engine.run` takes them.

    Attributes:
      answers: number of a line -> its answers, until `answer_lines` takes them out.
    """

    def __init__(self, path: str, skip: int, model: Llava, image_root: Path, sampling: dict):
        self.answers: dict[int, list[Answer]] = {}
        self.ids: dict[int, object] = {}
        self.next = skip
        self._path, self._skip, self._model = path, skip, model
        self._root, self._sampling = image_root, sampling

    def __iter__(self) -> Iterator:
        with open(self._path, "rb") as file:  # as bytes, one wrong line leaves the others readable
            for number, line in enumerate(file):
                if number >= self._skip:
                    yield from self._entries(number, line)

    def _entries(self, number: int, line: bytes) -> list:
        """What the engine is to run for a line; a wrong one gets an answer at once and nothing."""
        self.ids[number] = number
        try:
            item = self._parse(number, line)
            names = {k: v for k, v in item.items() if k not in OWN_KEYS}
            params = SamplingParams.from_names(self._sampling, names)
            history = [tuple(pair) for pair in item.get("history", ())]
            request = self._model.request(item["prompt"], self._images(item), params, history)
        except LlavaError as error:
            failed = Answer(self._model.tokenizer, (), ())
            failed.fail(error)
            self.answers[number] = [failed]
            return []
        jobs = self._model.jobs(request)
        self.answers[number] = [job.answer for job in jobs]
        return jobs

    def _parse(self, number: int, line: bytes) -> dict:
        try:
            item = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise LlavaError(f"not a line of JSON: {error}") from None
        if isinstance(item, dict):
            self.ids[number] = item.get("id", number)
        if not isinstance(item, dict) or not isinstance(item.get("prompt"), str):
            raise LlavaError("a request must be a JSON object with a text 'prompt'")
        history = item.get("history", [])
        if not isinstance(history, list) or not all(isinstance(pair, list) for pair in history):
            raise LlavaError("history must be a list of [question, answer]")
        return item

    def _images(self, item: dict) -> list:
        images = item.get("images")
        images = [] if images is None else images if isinstance(images, list) else [images]
        if not all(isinstance(image, str) and image for image in images):
            raise LlavaError("images must be paths or addresses, none empty")
        return [image if is_address(image) else self._root / image for image in images]


def answer_lines(model: Llava, requests: Requests, batch_size: int) -> Iterator[dict]:
    """The lines of the answers in the order of the requests, each as soon as it is its turn."""
    for _ in model.engine.run(requests, batch_size):
        yield from _finished(requests)
    yield from _finished(requests)


def _finished(requests: Requests) -> Iterator[dict]:
    while requests.next in requests.answers:
        answers = requests.answers[requests.next]
        if not all(answer.done for answer in answers):
            return
        del requests.answers[requests.next]
        yield answer_line(requests.ids.pop(requests.next), answers)
        requests.next += 1


def report(model: Llava, seconds: float, wrong: int) -> None:
    """Throughput of this run on stderr, and how many requests have an error for an answer."""
    c = model.engine.counts
    seconds = max(seconds, 1e-9)
    print(
        f"{c.requests:,} requests in {seconds:,.1f} s: {c.requests / seconds:,.1f} requests/s, "
        f"{c.prompt_tokens / seconds:,.0f} prompt tokens/s "
        f"({c.shared_tokens / max(c.prompt_tokens, 1):.0%} shared), "
        f"{c.answer_tokens / seconds:,.0f} answer tokens/s, "
        f"{c.encoded_images:,} of {c.images:,} images encoded",
        file=sys.stderr,
    )
    if wrong:
        print(f"wrong requests: {wrong:,}; their lines have an 'error'", file=sys.stderr)
