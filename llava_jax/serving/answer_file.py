"""The file of answers that `llava-jax generate` writes: its run, its progress, its lines."""

import json
from pathlib import Path
from typing import BinaryIO

from llava_jax import files
from llava_jax.inference.answer import Answer, TokenLogprob


def open_answers(path: Path, run: dict, overwrite: bool) -> tuple[BinaryIO, int]:
    """Claims the file for this run; returns it opened for appending, and its number of lines.

    A line that a killed run left incomplete is cut off. The file stays locked until it is closed,
    so two runs never write to it at once.

    Args:
      run: what the answers depend on; kept next to the file, in FILE.run.json.
      overwrite: drop what is there.

    Raises:
      LlavaError: another run is writing to it, or it holds answers to other requests, of another
        model or with other settings.
    """
    mark = path.with_name(path.name + ".run.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a+b")
    try:
        busy = f"another run is writing to {path} now: give another --output"
        files.lock(file, path, busy)
        if overwrite:
            file.truncate(0)
        files.claim(mark, run, path)
        return file, _repair(file)
    except BaseException:
        file.close()
        raise


def _repair(file: BinaryIO) -> int:
    """Cuts off a line that a killed run left incomplete; returns the number of lines."""
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
