"""Results as text: the table of one benchmark, and one report over all in a folder."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from llava_jax.errors import LlavaError
from llava_jax.evaluation.benchmark import Score
from llava_jax.evaluation.files import NOT_AS_EXPECTED
from llava_jax.evaluation.published import MODELS, PUBLISHED
from llava_jax.files import whole_file, write_json

# Benchmarks of hallucination, by the first part of their name; `hallucination_table` shows them.
HALLUCINATION = (
    "pope", "repope", "amber", "chair", "hallusionbench", "naturalbench", "mmvp"
)  # fmt: skip


def table(scores: Sequence[Score]) -> str:
    """Scores as lines of text: kind, n, and a column per metric with its standard error."""
    names = list(dict.fromkeys(name for score in scores for name in score.values))
    rows = [(s.kind, f"{s.count:,}", *(_figure(s, name) for name in names)) for s in scores]
    return aligned([("kind", "n", *names), *rows])


def aligned(rows: Sequence[Sequence[str]], least: int = 10) -> str:
    """Rows of cells as lines of text: the first column to the left, the others to the right.

    least: the width of a narrow column; the second, with counts, may be narrower.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    widths = [max(width, 7 if i == 1 else least) for i, width in enumerate(widths)]
    lines = []
    for first, *others in rows:
        cells = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)


def _figure(score: Score, name: str) -> str:
    """`85.9 ±0.7`: the value and its standard error, or what of them there is."""
    if name not in score.values:
        return ""
    error = f" ±{score.errors[name]:.1f}" if name in score.errors else ""
    return f"{score.values[name]:.1f}{error}"


def comparison(benchmark: str, scores: Sequence[Score]) -> str:
    """One line: the score and the published scores of the same benchmark."""
    here = "not scored here"
    if scores:
        name = next(iter(scores[-1].values))
        here = f"{scores[-1].kind} {name} {_figure(scores[-1], name)}"
    published = PUBLISHED.get(benchmark, {})
    others = ", ".join(f"{model} {value:.1f}" for model, value in published.items())
    return f"{benchmark}: {here} ({others or 'none published'})"


def hallucination_table(folder: Path) -> str:
    """One line per hallucination benchmark finished below `folder`; empty if there is none."""
    rows = []
    for name, metrics in _results(folder):
        family = metrics["benchmark"].partition("-first-")[0].partition("/")[0]
        scores = _scores(metrics)
        if scores and family in HALLUCINATION:
            last = scores[-1]
            first = next(iter(last.values))
            note = " (lower is better)" if first.startswith("CHAIR") else ""
            rates = (_figure(last, rate) for rate in ("yes", "false yes"))
            rows.append((name, f"{last.count:,}", first + note, _figure(last, first), *rates))
    head = ("hallucination", "n", "metric", "score", "yes", "false yes")
    return aligned([head, *rows]) if rows else ""


def write_report(folder: Path) -> Path:
    """report.md and report.json over every finished benchmark below `folder`."""
    results, rows, details = {}, [], []
    for name, metrics in _results(folder):
        results[name] = metrics
        scores = _scores(metrics)
        rows.append((name, metrics, scores))
        if scores:
            details.append(f"## {name}\n\n```\n{table(scores)}\n```\n")
    write_json(folder / "report.json", results)
    path = folder / "report.md"
    lines = [_line(["benchmark", "questions", "metric", "score", *MODELS])]
    lines.append("|---|--:|---|--:|" + "--:|" * len(MODELS))
    lines += [_line(_cells(*row)) for row in rows]
    text = "\n".join(lines) + "\n\n" + "\n".join(details)
    with whole_file(path) as file:
        file.write(text.encode())
    return path


def _results(folder: Path) -> list[tuple[str, Mapping]]:
    """(name, metrics.json) of every finished result below `folder`.

    The name is the benchmark's; before it a folder, if another --output is inside this one.
    """
    results = []
    for mark in sorted(folder.rglob("run.json")):  # a metrics.json without one is another program's
        path = mark.with_name("metrics.json")
        if not path.exists():
            continue
        try:
            metrics = json.loads(path.read_text(encoding="utf-8"))
            _cells("", metrics, _scores(metrics))
        except NOT_AS_EXPECTED as error:
            raise LlavaError(f"cannot read the result {path}: {error}; delete it") from None
        results.append((mark.parent.relative_to(folder).as_posix(), metrics))
    return results


def _cells(name: str, metrics: Mapping, scores: Sequence[Score]) -> list[str]:
    """The cells of one line of the report's table."""
    metric, value = "to be graded", metrics.get("submission", "")
    if scores:
        first = next(iter(scores[-1].values))
        metric, value = f"{first}, {scores[-1].kind}", _figure(scores[-1], first)
    published = PUBLISHED.get(metrics["benchmark"], {})
    figures = (f"{published[model]:.1f}" if model in published else "" for model in MODELS)
    return [name, f"{metrics['answers']:,}", metric, value, *figures]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _scores(metrics: Mapping) -> list[Score]:
    """The lines of a metrics.json."""
    errors = metrics.get("standard_errors", {})
    return [
        Score(
            kind,
            values["count"],
            {k: v for k, v in values.items() if k != "count"},
            errors.get(kind, {}),
        )
        for kind, values in metrics["scores"].items()
    ]
