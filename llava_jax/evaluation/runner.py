"""Asks a model the questions of a benchmark and writes answers and scores; resumes where it ended.

The folder of a result holds `run.json` (what was asked of which model), `predictions.jsonl` (one
line a question, in order) and, at the end, `metrics.json`.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from llava_jax.errors import LlavaError
from llava_jax.evaluation.benchmark import Benchmark, Question, Score
from llava_jax.evaluation.fingerprint import weights_fingerprint
from llava_jax.inference.model import Llava
from llava_jax.inference.sampling import SamplingParams
from llava_jax.weights.run_directory import write_json

BATCHES_AT_A_TIME = 4  # questions sorted by shape together, and the most a kill can lose


def evaluate(
    model: Llava,
    benchmark: Benchmark,
    output: str | os.PathLike,
    max_new_tokens: int,
    batch_size: int,
    overwrite: bool = False,
) -> list[Score]:
    """Greedy answers to every question of `benchmark`, written below `output`, and their scores.

    An interrupted run continues. LlavaError where `output` holds answers of another model or of
    other questions, unless `overwrite`.
    """
    if batch_size < 1:
        raise LlavaError(f"batch_size must be at least 1, not {batch_size}")
    params = SamplingParams(max_new_tokens)
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    run = {
        "benchmark": benchmark.name,
        "questions": benchmark.fingerprint,
        "weights": weights_fingerprint(model.engine.params),
        "template": model.template.name,
        "dtype": model.dtype,
        "max_new_tokens": max_new_tokens,
    }
    path = output / "predictions.jsonl"
    _claim(output, run, overwrite)
    done = _finished(path, benchmark.questions)
    predictions = [line["prediction"] for line in done]
    window = BATCHES_AT_A_TIME * batch_size
    total = len(benchmark.questions)
    with (
        open(path, "a", encoding="utf-8") as file,
        tqdm(total=total, initial=len(done), unit="question", desc=benchmark.name) as bar,
    ):
        for start in range(len(done), total, window):
            questions = benchmark.questions[start : start + window]
            requests = [
                model.request(q.prompt, q.images, params, where=f"question {start + i} ({q.id}): ")
                for i, q in enumerate(questions)
            ]
            texts = model.answer(requests, batch_size, bar.update)
            for question, text in zip(questions, texts, strict=True):
                file.write(json.dumps(_line(question, text), ensure_ascii=False) + "\n")
            file.flush()
            predictions += texts
    scores = benchmark.score(predictions)
    metrics = {**run, "scores": {score.kind: asdict(score) for score in scores}}
    write_json(output / "metrics.json", metrics)
    return scores


def table(scores: Sequence[Score]) -> str:
    """Scores as lines of text: kind, n, accuracy, and the blind baseline where it is known."""
    lines = [f"{'kind':<10} {'n':>7} {'accuracy':>9} {'blind':>7}"]
    for score in scores:
        blind = "" if score.blind_accuracy is None else f"{score.blind_accuracy:.1%}"
        lines.append(f"{score.kind:<10} {score.count:>7,} {score.accuracy:>9.1%} {blind:>7}")
    return "\n".join(lines)


def _line(question: Question, prediction: str) -> dict:
    return {
        "id": question.id,
        "question": question.text,
        "prediction": prediction,
        "reference": question.reference,
        "image": question.image_name,
    }


def _claim(output: Path, run: dict, overwrite: bool) -> None:
    """Marks the folder as this run's; LlavaError if it is another's."""
    mark, predictions = output / "run.json", output / "predictions.jsonl"
    if overwrite:
        predictions.unlink(missing_ok=True)
    elif predictions.exists():
        try:
            other = json.loads(mark.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            other = {}
        changed = [key for key in run if other.get(key) != run[key]]
        if changed:
            raise LlavaError(
                f"{predictions} holds answers of another run (different: {', '.join(changed)}): "
                "give another --output, or --overwrite to ask again"
            )
    (output / "metrics.json").unlink(missing_ok=True)
    write_json(mark, run)


def _finished(path: Path, questions: Sequence[Question]) -> list[dict]:
    """The lines that an earlier run completed; what a kill left behind them is cut off."""
    if not path.exists():
        return []
    lines, size = [], 0
    with open(path, "rb") as file:
        for raw in file:
            try:
                line = json.loads(raw)
            except ValueError:
                break
            at = len(lines)
            if not raw.endswith(b"\n") or at == len(questions) or line["id"] != questions[at].id:
                break
            lines.append(line)
            size += len(raw)
    os.truncate(path, size)
    return lines
