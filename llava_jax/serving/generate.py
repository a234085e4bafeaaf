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
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from llava_jax.errors import LlavaError
from llava_jax.files import json_line
from llava_jax.inference.answer import Answer
from llava_jax.inference.fingerprint import weights_fingerprint
from llava_jax.inference.jobs import Job, Request
from llava_jax.inference.model import Llava
from llava_jax.inference.sampling import SamplingParams
from llava_jax.parallel import hosts
from llava_jax.parallel.shares import Shard
from llava_jax.serving.answer_file import (
    answer_line,
    answered,
    drop_answers,
    open_answers,
    open_part,
    part_line,
    parts,
    put_together,
)
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
    """Answers every request that has no answer yet; returns the exit code.

    Hosts on which it was started together share the requests.
    """
    check_arguments(args)
    with open(args.input, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
        ids = line_ids(file)
    output = Path(args.output)
    with hosts.meeting(output.with_name(output.name + ".hosts"), __file__) as meeting:
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
        meeting.first_alone(lambda: args.overwrite and drop_answers(output))
        start = time.perf_counter()
        # Parts that several hosts have left are put together by whoever comes next.
        share = meeting.place or (Shard(1, 1) if parts(output) else None)
        if share is None:
            file, done = open_answers(output, run)
            wrong = answer(args, model, ids, range(done, len(ids)), file)
        else:
            if meeting.place:
                print(share.describe(len(ids), "requests"), file=sys.stderr)
            with open_part(output, share, run) as part:
                done = answered(output, run)
                todo = [number for number in share.of(range(len(ids))) if number not in done]
                answer(args, model, ids, todo, part, part_line, quiet=not meeting.is_first)
            if not meeting.is_first:
                return 0
            meeting.collect(lambda: missing(output, run, len(ids)))
            wrong = put_together(output, run, len(ids))
    report(model, time.perf_counter() - start, wrong)
    return 0


def missing(output: Path, run: dict, total: int) -> list[str]:
    """["7 of 100 requests"] if so many have no answer; [] if all have."""
    count = total - len(answered(output, run))
    return [f"{count} of {total} requests"] if count else []


def answer(
    args: argparse.Namespace,
    model: Llava,
    ids: list,
    todo: Sequence[int],
    output: BinaryIO,
    form: Callable[[int, bytes], bytes] = lambda number, line: line,
    quiet: bool = False,
) -> int:
    """Answers the requests of these numbers, which ascend; returns how many were wrong.

    Args:
      output: takes each line in turn, in the form that `form` gives it; closed at the end.
      quiet: show no progress.
    """
    root = Path(args.image_root) if args.image_root else Path(args.input).parent
    read = lambda line: read_request(model, read_line(line), root, args.sampling)
    total, before, wrong = len(ids), len(ids) - len(todo), 0
    bar = tqdm(total=total, initial=before, unit="request", desc="generate", disable=quiet)
    # As bytes, one wrong line leaves the others readable.
    with output, open(args.input, "rb") as lines, bar:
        requests = Requests(model, lines, ids, read, todo)
        for number, line in zip(todo, answer_lines(model, requests, args.batch_size), strict=True):
            output.write(form(number, json_line(line)))
            output.flush()
            wrong += "error" in line
            bar.update()
    return wrong


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
      todo: numbers of the requests to answer, which ascend; None: all.

    Attributes:
      answers: number of a request -> its answers, until `answer_lines` takes them out.
      left: numbers of the requests that it has yet to take out.
    """

    def __init__(
        self,
        model: Llava,
        items: Iterable,
        ids: Sequence,
        read: Callable[[Any], Request],
        todo: Sequence[int] | None = None,
    ):
        self.ids = ids
        self.answers: dict[int, list[Answer]] = {}
        self._todo = range(len(ids)) if todo is None else todo
        self.left = deque(self._todo)
        self._model, self._items, self._read = model, items, read

    def __iter__(self) -> Iterator[Job]:
        todo = iter(self._todo)
        ahead = next(todo, None)
        for number, item in enumerate(self._items):
            if number == ahead:
                yield from self._jobs(number, item)
                ahead = next(todo, None)

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
    while requests.left and (number := requests.left[0]) in requests.answers:
        answers = requests.answers[number]
        if not all(answer.done for answer in answers):
            return
        del requests.answers[number]
        requests.left.popleft()
        yield answer_line(requests.ids[number], answers)


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
