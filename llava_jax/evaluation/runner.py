"""Asks a model the questions of a benchmark, writes answers and scores, and can be interrupted.

The folder of a result holds `run.json` (the model, the questions and the settings),
`predictions.jsonl` (one line per question, in order) and, at the end, `metrics.json`, the file for
the benchmark's server and `failures.html`. The shards of a run, which several machines may answer
at once, have folders of their own below it.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from absl import logging
from tqdm import tqdm

from llava_jax.errors import LlavaError
from llava_jax.evaluation import confidence
from llava_jax.evaluation.benchmark import Benchmark, Question, Score
from llava_jax.evaluation.failures import write_failures
from llava_jax.files import check_claim, claim, json_line, locked, whole_file, write_json
from llava_jax.inference.answer import Answer
from llava_jax.inference.fingerprint import weights_fingerprint
from llava_jax.inference.jobs import Request
from llava_jax.inference.model import Llava
from llava_jax.inference.sampling import MAX_LOGPROBS, SamplingParams
from llava_jax.parallel.shares import Shard

BATCHES_AT_A_TIME = 4  # these are sorted by shape together; a kill loses at most their answers


def evaluate(
    model: Llava,
    benchmark: Benchmark,
    output: str | os.PathLike,
    max_new_tokens: int,
    batch_size: int,
    overwrite: bool = False,
    shard: Shard | None = None,
    settings: Mapping[str, str | None] | None = None,
    sampling: Mapping[str, object] | None = None,
    min_yes: float = 0.0,
    quiet: bool = False,
) -> list[Score]:
    """Answers every question of `benchmark`, writes below `output`, returns the scores.

    An interrupted run continues and takes over the answers of all shards, also of another number
    of them. With `shard` only that part is answered and nothing is scored. LlavaError if `output`
    holds answers of another model, to other questions or with other settings, unless `overwrite`.

    Args:
      settings: what else the answers depend on, None for a default.
      sampling: parameters other than the defaults, which are greedy. Questions without a picture
        are asked without contrast.
      min_yes: the least confidence that an answer with yes needs, see confidence.py; with it, the
        scores begin with a line for each of other limits. 0 is off.
    """
    if batch_size < 1:
        raise LlavaError(f"batch_size must be at least 1, not {batch_size}")
    if benchmark.by_boxes:
        benchmark = benchmark.reading(model.boxes)
    params = answer_settings(max_new_tokens, sampling, min_yes)
    asker = Asker(model, params, batch_size, min_yes, quiet)
    run = {
        "benchmark": benchmark.name,
        "questions": benchmark.fingerprint,
        "weights": weights_fingerprint(model.engine.params, model.dtype),
        "template": model.template.name,
        "dtype": model.dtype,
        "max_new_tokens": max_new_tokens,
        "sampling": dict(sampling) if sampling else None,
        "min_yes": min_yes or None,
    } | dict(settings or {})
    questions = shard.of(benchmark.questions) if shard else benchmark.questions
    folders, output = _folders(output), Path(output) / shard.folder if shard else Path(output)
    output.mkdir(parents=True, exist_ok=True)
    with locked(output, _busy(output)):
        mine = [output] if shard else folders  # other shards may be at work now
        theirs = [] if overwrite else [folder for folder in folders if folder not in mine]
        for folder in mine:
            answers = folder / "predictions.jsonl"
            if overwrite:
                answers.unlink(missing_ok=True)
            claim(folder / "run.json", run, answers)
        for folder in theirs:
            check_claim(folder / "run.json", run, folder / "predictions.jsonl")
        (output / "metrics.json").unlink(missing_ok=True)
        done = _answered([*mine, *theirs], benchmark, repair=output)
        done |= asker.answer(benchmark.name, questions, done, output)
        answers = [done[question.id] for question in questions]
        grade = None if shard else benchmark.grade
        lines = (
            _line(question, line["prediction"], line.get("yes"), grade)
            for question, line in zip(questions, answers, strict=True)
        )
        with whole_file(output / "predictions.jsonl") as file:
            file.writelines(map(json_line, lines))
        return [] if shard else _conclude(benchmark, run, answers, output)


def unanswered(benchmark: Benchmark, output: str | os.PathLike) -> int:
    """How many questions have no answer below `output` yet, neither there nor in its shards."""
    return len(benchmark.questions) - len(_answered(_folders(output), benchmark))


def drop_answers(output: str | os.PathLike) -> None:
    """Deletes the answers and scores below `output`, those of its shards too."""
    for folder in filter(Path.is_dir, _folders(output)):
        with locked(folder, _busy(folder)):
            for name in ("predictions.jsonl", "metrics.json"):
                (folder / name).unlink(missing_ok=True)


def _folders(output: str | os.PathLike) -> list[Path]:
    """The folder of a result, and those of its shards."""
    output = Path(output)
    return [output, *sorted(output.glob("shard-*-of-*"))]


def _busy(folder: Path) -> str:
    return f"another eval.py is writing to {folder} now: wait for it, or give another --output"


def answer_settings(
    max_new_tokens: int, sampling: Mapping[str, object] | None = None, min_yes: float = 0.0
) -> SamplingParams:
    """How questions are answered; LlavaError for a wrong value. Arguments as in `evaluate`."""
    if not 0 <= min_yes <= 1:
        raise LlavaError(f"min_yes must be from 0 to 1, not {min_yes}")
    read = {"logprobs": MAX_LOGPROBS} if min_yes else {}
    return SamplingParams.from_names({"max_tokens": max_new_tokens, **(sampling or {})}, read)


def default_output(checkpoint: str) -> Path:
    """`eval` in the work directory of the checkpoint, which may be one step of a run.

    For a name on the Hugging Face hub it is runs/NAME/eval; a local folder ORG/NAME would be taken
    for the model itself.
    """
    path = Path(checkpoint)
    if not path.exists():
        return Path("runs", path.name, "eval")
    return (path.parent.parent if path.parent.name == "checkpoints" else path) / "eval"


@dataclasses.dataclass(frozen=True)
class Asker:
    """Asks a model questions; arguments as in `evaluate`."""

    model: Llava
    params: SamplingParams
    batch_size: int
    min_yes: float
    quiet: bool

    def answer(self, name: str, questions, done: Mapping[str, dict], output: Path) -> dict:
        """Asks those missing in `done`; appends each window of answers to predictions.jsonl."""
        todo = [(i, q) for i, q in enumerate(questions) if q.id not in done]
        window = BATCHES_AT_A_TIME * self.batch_size
        new, asked = {}, len(questions) - len(todo)
        with (
            open(output / "predictions.jsonl", "ab") as file,
            tqdm(
                total=len(questions), initial=asked, unit="question", desc=name, disable=self.quiet
            ) as bar,
        ):
            for start in range(0, len(todo), window):
                part = todo[start : start + window]
                requests = [self._request(*numbered) for numbered in part]
                answers = self.model.answers(requests, self.batch_size, bar.update)
                lines = [self._line(q, *of) for (_, q), of in zip(part, answers, strict=True)]
                file.writelines(map(json_line, lines))
                file.flush()
                new |= {line["id"]: line for line in lines}
        return new

    def _request(self, number: int, question: Question) -> Request:
        params = self.params if question.images else self.params.without_contrast()
        where = f"question {number} ({question.id}): "
        return self.model.request(question.prompt, question.read_images(), params, where=where)

    def _line(self, question: Question, answer: Answer) -> dict:
        if not self.min_yes:
            return _line(question, answer.text)
        yes = confidence.yes_confidence(answer, self.model.tokenizer)
        return _line(question, confidence.limited(answer.text, yes, self.min_yes), yes)


def _conclude(benchmark: Benchmark, run: dict, answers: list[dict], output: Path) -> list[Score]:
    """Scores all answers and writes metrics.json, the submission and the page of failures.

    answers: a line of predictions.jsonl for each question.
    """
    questions = benchmark.questions
    predictions = [line["prediction"] for line in answers]
    scores = benchmark.score(questions, predictions) if benchmark.score else []
    if run["min_yes"]:
        confidences = [line.get("yes") for line in answers]
        curve = confidence.curve(questions, confidences) if scores else []
        scores = [*curve, *scores]
        if not curve:
            logging.warning("%s: %s", benchmark.name, confidence.why_no_curve(confidences))
    metrics = {**run, "scores": {s.kind: {"count": s.count, **s.values} for s in scores}}
    if errors := {s.kind: dict(s.errors) for s in scores if s.errors}:
        metrics["standard_errors"] = errors
    metrics["answers"] = len(predictions)
    if benchmark.submit:
        metrics["submission"] = benchmark.submit(questions, predictions, output).name
    if benchmark.grade:
        write_failures(output / "failures.html", benchmark, predictions)
    write_json(output / "metrics.json", metrics)
    return scores


def _line(
    question: Question,
    prediction: str,
    yes: float | None = None,
    grade: Callable[[Question, str], float] | None = None,
) -> dict:
    line = {
        "id": question.id,
        "question": question.text,
        "prediction": prediction,
        "reference": question.reference,
        "image": question.image_name,
    }
    if question.group:
        line["group"] = question.group
    if yes is not None:
        line["yes"] = yes
    if grade:
        line["grade"] = grade(question, prediction)
    return line


def _answered(
    folders: Sequence[Path], benchmark: Benchmark, repair: Path | None = None
) -> dict[str, dict]:
    """The complete lines below several folders, by id; the file in `repair` is cut after them."""
    ids, lines = {question.id for question in benchmark.questions}, {}
    for folder in folders:
        lines |= _finished(folder / "predictions.jsonl", ids, folder == repair)
    return lines


def _finished(path: Path, ids: set[str], repair: bool) -> dict[str, dict]:
    """The complete lines of an earlier run, by id.

    repair: truncate the file after them. A shard's file is left alone: it may still be written.
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
            # A line of another form was not written here, and ends what can be used.
            texts = [line.get(k) for k in ("id", "prediction")] if isinstance(line, dict) else []
            ours = bool(texts) and all(isinstance(text, str) for text in texts)
            if not ours or not raw.endswith(b"\n") or line["id"] not in ids:
                break
            lines[line["id"]] = line
            size += len(raw)
    if repair:
        os.truncate(path, size)
    return lines
