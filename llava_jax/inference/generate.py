"""`llava-jax generate`: a file of requests to a file of answers, resumed where it ended.

A line of requests is a JSON object with `prompt`, and where wanted `id`, `images` (a path below
`--image_root`, a data: address or, when allowed, an http one; one or a list), `history` (a list of
[question, answer]) and any sampling parameter by vLLM's or Hugging Face's name. Its answer is a
line in the same place: `id`, `text`, `finish_reason`, token counts; with n over 1 `texts`, with
log probabilities `logprobs`; or `id` and `error`.
"""

import argparse
import contextlib
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from llava_jax.errors import LlavaError
from llava_jax.inference.answer import Answer, TokenLogprob
from llava_jax.inference.command_line import add_model_arguments, load_from_arguments
from llava_jax.inference.model import Llava
from llava_jax.inference.sampling import SamplingParams
from llava_jax.weights.run_directory import write_json

OWN_KEYS = {"id", "prompt", "images", "history"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--input", required=True, metavar="FILE", help="requests, JSON lines")
    parser.add_argument("--output", required=True, metavar="FILE", help="answers, JSON lines")
    parser.add_argument("--image_root", default="", metavar="DIR", help="default: beside --input")
    parser.add_argument("--batch_size", type=int, default=32, metavar="N", help="requests at once")
    parser.add_argument(
        "--sampling",
        type=json.loads,
        default={},
        metavar="JSON",
        help="""for requests that do not say otherwise, such as '{"max_tokens": 64}'""",
    )
    parser.add_argument("--overwrite", action="store_true", help="drop answers of another run")


def main(args: argparse.Namespace) -> int:
    """Answers every request that has no answer yet; returns the exit code."""
    if not Path(args.input).is_file():
        raise LlavaError(f"no file of requests at {args.input}")
    if args.batch_size < 1:
        raise LlavaError(f"--batch_size must be at least 1, not {args.batch_size}")
    if not isinstance(args.sampling, dict):
        raise LlavaError("--sampling must be a JSON object of sampling parameters")
    SamplingParams.from_names(args.sampling)
    digest = hashlib.sha256(Path(args.input).read_bytes()).hexdigest()
    done = claim(
        Path(args.output),
        {
            "input": digest,
            "checkpoint": str(Path(args.checkpoint).resolve()),
            "sampling": args.sampling,
            "dtype": args.dtype,
            "weights": args.weights,
            "kv_cache": args.kv_cache,
        },
        args.overwrite,
    )
    with open(args.input, encoding="utf-8", errors="replace") as file:
        total = sum(1 for _ in file)
    model = load_from_arguments(args)
    root = Path(args.image_root) if args.image_root else Path(args.input).parent
    start = time.perf_counter()
    with (
        open(args.output, "ab") as output,
        tqdm(total=total, initial=done, unit="request", desc="generate") as bar,
    ):
        requests = Requests(args.input, done, model, root, args.sampling)
        for line in answer_lines(model, requests, args.batch_size):
            output.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
            output.flush()
            bar.update()
    report(model, time.perf_counter() - start)
    return 0


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
        with open(self._path, encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file):
                if number >= self._skip:
                    yield from self._entries(number, line)

    def _entries(self, number: int, line: str) -> list:
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
        entries = self._model.entries(request)
        self.answers[number] = [answer for _, answer in entries]
        return entries

    def _parse(self, number: int, line: str) -> dict:
        try:
            item = json.loads(line)
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
        images = item.get("images") or []
        images = images if isinstance(images, list) else [images]
        if not all(isinstance(image, str) for image in images):
            raise LlavaError("images must be paths or addresses")
        is_address = lambda image: image.startswith(("data:", "http:", "https:"))
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


def answer_line(id, answers: list[Answer]) -> dict:
    """What is written of one request."""
    first = answers[0]
    for answer in answers:
        if answer.error:
            return {"id": id, "error": str(answer.error)}
    line = {"id": id, "text": first.text, "finish_reason": first.finish_reason}
    if len(answers) > 1:
        line["texts"] = [answer.text for answer in answers]
    line["prompt_tokens"] = first.prompt_tokens
    line["completion_tokens"] = sum(len(answer.tokens) for answer in answers)
    if first.logprobs:
        line["logprobs"] = [_logprobs(answer.logprobs) for answer in answers]
    if first.prompt_logprobs:
        line["prompt_logprobs"] = _logprobs(first.prompt_logprobs)
    return line


def _logprobs(told: list[TokenLogprob]) -> list[dict]:
    return [{"token": t.token, "logprob": t.logprob, "top": t.top} for t in told]


def claim(output: Path, run: dict, overwrite: bool) -> int:
    """Makes an output file this run's; how many of its lines are whole, the rest cut off.

    Raises:
      LlavaError: it holds answers to other requests, or of another model or other settings.
    """
    mark = output.with_name(output.name + ".run.json")
    if overwrite:
        output.unlink(missing_ok=True)
    if output.exists() and output.stat().st_size:
        other = {}
        with contextlib.suppress(OSError, ValueError):
            other = json.loads(mark.read_text(encoding="utf-8"))
        changed = [key for key in run if other.get(key) != run[key]]
        if changed:
            raise LlavaError(
                f"{output} holds answers of another run (different: {', '.join(changed)}): give "
                "another --output, or --overwrite to ask again"
            )
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(mark, run)
    return repair(output)


def repair(output: Path) -> int:
    """Cuts off what a kill left behind the last whole line; the number of lines."""
    lines = size = 0
    if output.exists():
        with open(output, "rb") as file:
            for raw in file:
                try:
                    json.loads(raw)
                except ValueError:
                    break
                if not raw.endswith(b"\n"):
                    break
                lines, size = lines + 1, size + len(raw)
        os.truncate(output, size)
    return lines


def report(model: Llava, seconds: float) -> None:
    """Throughput of this run on stderr."""
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
