"""The file of answers that `llava-jax generate` writes: whose it is, how far it got, its lines."""

import contextlib
import fcntl
import json
import os
from pathlib import Path
from typing import BinaryIO

from llava_jax.errors import LlavaError
from llava_jax.inference.answer import Answer, TokenLogprob
from llava_jax.weights.run_directory import write_json


def open_answers(path: Path, run: dict, overwrite: bool) -> tuple[BinaryIO, int]:
    """Makes the file this run's -> it, open to be added to, and how many of its lines are whole.

    What a kill left behind the last whole line is cut off. The file stays locked until it is
    closed, so that two runs never write to it at once.

    Args:
      run: what the answers depend on; kept beside the file, in FILE.run.json.
      overwrite: drop what is there.

    Raises:
      LlavaError: another run writes to it now, or it holds answers to other requests, or of another
        model or other settings.
    """
    mark = path.with_name(path.name + ".run.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise LlavaError(f"another run is writing to {path} now: give another --output") from None
    if overwrite:
        file.truncate(0)
    if changed := os.fstat(file.fileno()).st_size and _changed(mark, run):
        file.close()
        raise LlavaError(
            f"{path} holds answers of another run (different: {', '.join(changed)}): give "
            "another --output, or --overwrite to ask again"
        )
    write_json(mark, run)
    return file, _repair(file)


def _changed(mark: Path, run: dict) -> list[str]:
    """What is different in the run that an answer file is marked with."""
    other = {}
    with contextlib.suppress(OSError, ValueError):
        other = json.loads(mark.read_text(encoding="utf-8"))
    other = other if isinstance(other, dict) else {}
    return [key for key in run if other.get(key) != run[key]]


def _repair(file: BinaryIO) -> int:
    """Cuts off what a kill left behind the last whole line; the number of lines."""
    lines = size = 0
    file.seek(0)
    for raw in file:
        try:
            json.loads(raw)
        except ValueError:
            break
        if not raw.endswith(b"\n"):
            break
        lines, size = lines + 1, size + len(raw)
    file.truncate(size)
    return lines


def encode_line(line: dict) -> bytes:
    """A line of JSON; half a character, which an id may have, is written as an escape."""
    return json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


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
