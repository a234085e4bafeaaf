"""The file of answers that `llava-jax generate` writes: its run, its progress, its lines.

Several hosts answer parts of it, each in a file next to it, until the first puts them together:

    answers.jsonl.shard-2-of-4    26<tab>{"id": "q26", "text": "a circle", ...}
                                  27<tab>{"id": "q27", ...

The number is that of the request, from 0; what follows is the line at that place of answers.jsonl.
"""

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from llava_jax import files
from llava_jax.inference.answer import Answer, TokenLogprob
from llava_jax.parallel.shares import Shard


def open_answers(path: Path, run: dict) -> tuple[BinaryIO, int]:
    """Claims the file for this run; returns it opened for appending, and its number of lines.

    A line that a killed run left incomplete is cut off. The file stays locked until it is closed,
    so two runs never write to it at once.

    Args:
      run: what the answers depend on; kept next to the file, in FILE.run.json.

    Raises:
      LlavaError: another run is writing to it, or it holds answers to other requests, of another
        model or with other settings.
    """
    return _claimed(path, run, json.loads)


def open_part(path: Path, shard: Shard, run: dict) -> BinaryIO:
    """Like `open_answers`, for the part of the file at `path` that one host answers."""
    return _claimed(path.with_name(f"{path.name}.{shard.folder}"), run, _number)[0]


def _claimed(path: Path, run: dict, read: Callable[[bytes], object]) -> tuple[BinaryIO, int]:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a+b")
    try:
        files.lock(file, path, _busy(path))
        files.claim(_mark(path), run, path)
        file.seek(0)
        lines = size = 0
        for raw, _ in _whole_lines(file, read):
            lines, size = lines + 1, size + len(raw)
        file.truncate(size)
        return file, lines
    except BaseException:
        file.close()
        raise


def _whole_lines(file: BinaryIO, read: Callable[[bytes], object]) -> Iterator[tuple[bytes, object]]:
    """The lines of a file and what `read` makes of them, up to one that a kill left incomplete."""
    for raw in file:
        try:
            value = read(raw)
        except ValueError:
            return
        if not raw.endswith(b"\n"):
            return
        yield raw, value


def part_line(number: int, line: bytes) -> bytes:
    """The line of a part for the request of this number, from the line that answers it."""
    return b"%d\t%b" % (number, line)


def _number(raw: bytes) -> int:
    """The number in a line of a part; ValueError if the line is not whole."""
    number, _, line = raw.partition(b"\t")
    json.loads(line)
    return int(number)


def parts(path: Path) -> list[Path]:
    """The files of hosts whose answers are not in the file at `path` yet."""
    name = re.compile(re.escape(path.name) + r"\.shard-\d+-of-\d+")
    siblings = path.parent.iterdir() if path.parent.is_dir() else ()
    return sorted(file for file in siblings if name.fullmatch(file.name))


def answered(path: Path, run: dict) -> set[int]:
    """Numbers of the requests that are answered in the file at `path` or in its parts.

    LlavaError if one of them is of another run.
    """
    files.check_claim(_mark(path), run, path)
    done = 0
    if path.exists():
        with open(path, "rb") as file:
            done = sum(1 for _ in _whole_lines(file, json.loads))
    return {*range(done), *_in_parts(path, run)}


def _in_parts(path: Path, run: dict) -> dict[int, tuple[Path, int]]:
    """Number of a request -> the part that answers it, and the offset of that line."""
    places = {}
    for part in parts(path):
        files.check_claim(_mark(part), run, part)
        offset = 0
        with open(part, "rb") as file:
            for raw, number in _whole_lines(file, _number):
                places[number] = part, offset
                offset += len(raw)
    return places


def put_together(path: Path, run: dict, total: int) -> int:
    """Completes the file at `path` from its parts, and deletes these.

    Args:
      total: lines of the complete file; the parts hold all that it lacks.

    Returns:
      How many of the lines that it lacked are errors.
    """
    places, wrong = _in_parts(path, run), 0
    file, done = open_answers(path, run)
    with contextlib.ExitStack() as stack:
        stack.enter_context(file)
        opened = {part: stack.enter_context(open(part, "rb")) for part in parts(path)}
        for number in range(done, total):
            part, offset = places[number]
            opened[part].seek(offset)
            line = opened[part].readline().partition(b"\t")[2]
            wrong += "error" in json.loads(line)
            file.write(line)
        file.flush()
        os.fsync(file.fileno())
        _delete_parts(path)
    return wrong


def drop_answers(path: Path) -> None:
    """Drops what is in the file at `path` and its parts; LlavaError if a run is writing to one."""
    with contextlib.ExitStack() as locks:
        for file in filter(Path.exists, (path, *parts(path))):
            locks.enter_context(files.locked(file, _busy(file)))
        if path.exists():
            os.truncate(path, 0)
        _delete_parts(path)


def _delete_parts(path: Path) -> None:
    for part in parts(path):
        part.unlink()
        _mark(part).unlink(missing_ok=True)


def _mark(path: Path) -> Path:
    return path.with_name(path.name + ".run.json")


def _busy(path: Path) -> str:
    return f"another run is writing to {path} now: give another --output"


def answer_line(id, answers: list[Answer]) -> dict:
    """The line of one request."""
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


def _logprobs(logprobs: list[TokenLogprob]) -> list[dict]:
    return [{"token": t.token, "logprob": t.logprob, "top": t.top} for t in logprobs]
