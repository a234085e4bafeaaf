"""`llava-jax generate`: a file of requests to a file of answers, resumed where it ended.

A line of the input is a JSON object, see requests.py. Its answer is the line at the same place of
the output: `id`, `text`, `finish_reason`, token counts; with n over 1 `texts`, with log
probabilities `logprobs`; or `id` and `error`.
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llava_jax.errors import LlavaError
from llava_jax.files import json_line
from llava_jax.inference.answer import Answer
from llava_jax.inference.fingerprint import weights_fingerprint
from llava_jax.inference.jobs import Job, Request
from llava_jax.inference.model import Llava
from llava_jax.inference.sampling import SamplingParams
from llava_jax.serving.answer_file import answer_line, open_answers
from llava_jax.serving.command_line import add_model_arguments, load_from_arguments
from llava_jax.serving.requests import read_line, read_request


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add = parser.add_argument
    add("--input", required=True, metavar="FILE", help="requests, one JSON object a line")
    add("--output", required=True, metavar="FILE", help="answers, one JSON object a line")
    add("--image_root", metavar="DIR", help="folder of the pictures; default: that of --input")
    add("--batch_size", type=int, default=32, metavar="N", help="requests computed at once")
    add(
        "--sampling",
        type=_json_object,
        default={},
        metavar="JSON",
        help="""for requests that give none, such as '{"max_tokens": 64}'; default: {}""",
    )
    add("--overwrite", action="store_true", help="drop the answers of another run")


def _json_object(text: str) -> dict:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object of sampling parameters")
    return value


def main(args: argparse.Namespace) -> int:
    """Answers every request that has no answer yet; returns the exit code."""
    check_arguments(args)
    with open(args.input, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
        ids = line_ids(file)
    model = load_from_arguments(args)
    run = {
        "input": digest,
        "parameters": weights_fingerprint(model.engine.params, model.dtype),
        "template": model.template.name,
        "sampling": args.sampling,
        "dtype": args.dtype,
        "weights": args.quantize,
        "kv_cache": args.kv_cache,
    }
    root = Path(args.image_root) if args.image_root else Path(args.input).parent
    output, done = open_answers(Path(args.output), run, args.overwrite)
    start, wrong = time.perf_counter(), 0
    read = lambda line: read_request(model, read_line(line), root, args.sampling)
    # As bytes, one wrong line leaves the others readable.
    with (
        output,
        open(args.input, "rb") as lines,
        tqdm(total=len(ids), initial=done, unit="request", desc="generate") as bar,
    ):
        requests = Requests(model, lines, ids, read, done)
        for line in answer_lines(model, requests, args.batch_size):
            output.write(json_line(line))
            output.flush()
            wrong += "error" in line
            bar.update()
    report(model, time.perf_counter() - start, wrong)
    return 0


def check_arguments(args: argparse.Namespace) -> None:
    """LlavaError for arguments that are wrong whatever the model is."""
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


def line_ids(lines) -> list:
    """The id of each request: its own, or the number of its line.

    A number that is the id of another request is written as "line N" instead.
    """
    ids, missing = [], []
    for number, line in enumerate(lines):
        try:
            item = read_line(line)
        except LlavaError:
            item = {}
        if "id" not in item:
            missing.append(number)
        ids.append(item.get("id", number))
    own = set(range(len(ids))) - set(missing)
    given = {json.dumps(ids[number]) for number in own}
    for number in missing:
        while json.dumps(ids[number]) in given:
            ids[number] = f"line {number}" if isinstance(ids[number], int) else f"{ids[number]}'"
    return ids


class Requests:
    """The jobs of requests that are read one after another, and their answers.

    Args:
      items: what each request is read from.
      ids: of each.
      read: gives the request of an item; LlavaError if it is wrong.
      skip: so many of the first are answered already.

    Attributes:
      answers: number of a request -> its answers, until `answer_lines` takes them out.
    """

    def __init__(
        self,
        model: Llava,
        items: Iterable,
        ids: Sequence,
        read: Callable[[Any], Request],
        skip: int = 0,
    ):
        self.ids = ids
        self.answers: dict[int, list[Answer]] = {}
        self.next = skip
        self._model, self._items, self._read, self._skip = model, items, read, skip

    def __iter__(self) -> Iterator[Job]:
        for number, item in enumerate(self._items):
            if number >= self._skip:
                yield from self._jobs(number, item)

    def _jobs(self, number: int, item) -> list[Job]:
        """The jobs of an item; a wrong one has none, and its error for an answer."""
        try:
            request = self._read(item)
        except LlavaError as error:
            failed = Answer(self._model.tokenizer, (), ())
            failed.fail(error)
            self.answers[number] = [failed]
            return []
        jobs = self._model.jobs(request)
        self.answers[number] = [job.answer for job in jobs]
        return jobs


def answer_lines(model: Llava, requests: Requests, batch_size: int) -> Iterator[dict]:
    """The lines of the answers, in the order of the requests."""
    for _ in model.engine.run(requests, batch_size):
        yield from _finished(requests)
    yield from _finished(requests)


def _finished(requests: Requests) -> Iterator[dict]:
    while requests.next in requests.answers:
        answers = requests.answers[requests.next]
        if not all(answer.done for answer in answers):
            return
        del requests.answers[requests.next]
        yield answer_line(requests.ids[requests.next], answers)
        requests.next += 1


def report(model: Llava, seconds: float, wrong: int) -> None:
    """Prints the throughput of this run, and how many requests were wrong, to stderr."""
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
