"""Asks a model the questions of a benchmark and writes answers and scores; resumes where it ended.

The folder of a result holds `run.json` (what was asked of which model), `predictions.jsonl` (one
line a question, in order) and, at the end, `metrics.json`, the file for the benchmark's server and
`failures.html`. Shards of a run lie in folders of their own below it.
"""

import json
import os
from pathlib import Path

from tqdm import tqdm

from llava_jax.errors import LlavaError
from llava_jax.evaluation.benchmark import Benchmark, Question, Score, Shard
from llava_jax.evaluation.failures import write_failures
from llava_jax.files import claim, json_line, locked, whole_file, write_json
from llava_jax.inference.fingerprint import weights_fingerprint
from llava_jax.inference.model import Llava
from llava_jax.inference.sampling import SamplingParams

BATCHES_AT_A_TIME = 4  # questions sorted by shape together, and the most a kill can lose


def evaluate(
    model: Llava,
    benchmark: Benchmark,
    output: str | os.PathLike,
    max_new_tokens: int,
    batch_size: int,
    overwrite: bool = False,
    shard: Shard | None = None,
) -> list[Score]:
    """Greedy answers to every question of `benchmark`, written below `output`, and their scores.

    An interrupted run continues, and takes over what shards of it have answered; a shard only
    answers. LlavaError where `output` holds answers of another model or of other questions,
    unless `overwrite`.
    """
    if batch_size < 1:
        raise LlavaError(f"batch_size must be at least 1, not {batch_size}")
    params = SamplingParams(max_new_tokens)
    run = {
        "benchmark": benchmark.name,
        "questions": benchmark.fingerprint,
        "weights": weights_fingerprint(model.engine.params, model.dtype),
        "template": model.template.name,
        "dtype": model.dtype,
        "max_new_tokens": max_new_tokens,
    }
    questions = shard.of(benchmark.questions) if shard else benchmark.questions
    output = Path(output) / shard.folder if shard else Path(output)
    output.mkdir(parents=True, exist_ok=True)
    busy = f"another eval.py is writing to {output} now: wait for it, or give another --output"
    with locked(output, busy):
        folders = [output] if shard else [output, *sorted(output.glob("shard-*-of-*"))]
        for folder in folders:
            predictions = folder / "predictions.jsonl"
            if overwrite:
                predictions.unlink(missing_ok=True)
            claim(folder / "run.json", run, predictions)
        (output / "metrics.json").unlink(missing_ok=True)
        ids = {question.id for question in questions}
        done = {}
        for folder in folders:
            done |= _finished(folder / "predictions.jsonl", ids, repair=folder == output)
        done |= _answer(model, benchmark.name, questions, done, output, params, batch_size)
        with whole_file(output / "predictions.jsonl") as file:
            file.writelines(json_line(done[question.id]) for question in questions)
        if shard:
            return []
        return _conclude(benchmark, run, [done[q.id]["prediction"] for q in questions], output)


def default_output(checkpoint: str) -> Path:
    """eval in the work directory of the checkpoint, of which it may be one step.

    For a name of the Hugging Face hub, runs/NAME/eval: a folder of the whole name would hide it.
    """
    path = Path(checkpoint)
    if not path.exists():
        return Path("runs", path.name, "eval")
    return (path.parent.parent if path.parent.name == "checkpoints" else path) / "eval"


def _answer(model, name, questions, done, output, params, batch_size) -> dict[str, dict]:
    """Asks what is not in `done`, appending each window of answers to predictions.jsonl."""
    todo = [(i, q) for i, q in enumerate(questions) if q.id not in done]
    window = BATCHES_AT_A_TIME * batch_size
    new = {}
    with (
        open(output / "predictions.jsonl", "ab") as file,
        tqdm(
            total=len(questions), initial=len(questions) - len(todo), unit="question", desc=name
        ) as bar,
    ):
        for start in range(0, len(todo), window):
            part = todo[start : start + window]
            requests = [
                model.request(q.prompt, q.images, params, where=f"question {i} ({q.id}): ")
                for i, q in part
            ]
            texts = model.answer(requests, batch_size, bar.update)
            lines = [_line(q, text) for (_, q), text in zip(part, texts, strict=True)]
            file.writelines(map(json_line, lines))
            file.flush()
            new |= {line["id"]: line for line in lines}
    return new


def _conclude(benchmark: Benchmark, run: dict, predictions: list[str], output: Path):
    """Scores and writes what is made of all answers."""
    questions = benchmark.questions
    scores = benchmark.score(questions, predictions) if benchmark.score else []
    metrics = {**run, "scores": {s.kind: {"count": s.count, **s.values} for s in scores}}
    metrics["answers"] = len(predictions)
    if benchmark.submit:
        metrics["submission"] = benchmark.submit(questions, predictions, output).name
    if benchmark.grade:
        write_failures(output / "failures.html", benchmark, predictions)
    write_json(output / "metrics.json", metrics)
    return scores


def _line(question: Question, prediction: str) -> dict:
    return {
        "id": question.id,
        "question": question.text,
        "prediction": prediction,
        "reference": question.reference,
        "image": question.image_name,
    }


def _finished(path: Path, ids: set[str], repair: bool) -> dict[str, dict]:
    """By id, the lines that an earlier run completed.

    repair: cut off what a kill left behind them. Not in a shard, which may be writing still.
    """
    lines, size = {}, 0
    if not path.exists():
        return lines
    with open(path, "rb") as file:
        for raw in file:
            try:
                line = json.loads(raw)
            except ValueError:
                break
            # Of another form: written by somebody else.
            texts = [line.get(k) for k in ("id", "prediction")] if isinstance(line, dict) else []
            ours = bool(texts) and all(isinstance(text, str) for text in texts)
            if not ours or not raw.endswith(b"\n") or line["id"] not in ids:
                break
            lines[line["id"]] = line
            size += len(raw)
    if repair:
        os.truncate(path, size)
    return lines
