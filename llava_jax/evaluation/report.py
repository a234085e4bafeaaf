"""Results as text: the table of one benchmark, and one report over all in a folder."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from llava_jax.errors import LlavaError
from llava_jax.evaluation.benchmark import Score
from llava_jax.evaluation.files import NOT_AS_EXPECTED

# LLaVA-1.5 7B and 13B, from its model zoo (https://github.com/haotian-liu/LLaVA). The last two
# were graded by GPT-4 of the time, which no later grading reproduces.
PUBLISHED = {
    "vqav2/test-dev2015": (78.5, 80.0),
    "gqa": (62.0, 63.3),
    "vizwiz": (50.0, 53.6),
    "scienceqa": (66.8, 71.6),
    "textvqa": (58.2, 61.3),
    "pope": (85.9, 85.9),
    "mme": (1510.7, 1531.3),
    "mmbench/mmbench_dev_20230712": (64.3, 67.7),
    "mmbench/mmbench_dev_cn_20231003": (58.3, 63.6),
    "seed": (58.6, 61.6),
    "llava_bench": (65.4, 72.5),
    "mmvet": (31.1, 36.1),
}
HEAD = (
    "| benchmark | questions | metric | score | LLaVA-1.5 7B | 13B |",
    "|---|--:|---|--:|--:|--:|",
)


def table(scores: Sequence[Score]) -> str:
    """Scores as lines of text: kind, n, and a column a metric."""
    names = list(dict.fromkeys(name for score in scores for name in score.values))
    width = max(10, *(len(score.kind) for score in scores))
    lines = [f"{'kind':<{width}} {'n':>7}" + "".join(f" {name:>10}" for name in names)]
    for score in scores:
        cells = (f"{score.values[name]:.1f}" if name in score.values else "" for name in names)
        row = "".join(f" {cell:>10}" for cell in cells)
        lines.append(f"{score.kind:<{width}} {score.count:>7,}{row}".rstrip())
    return "\n".join(lines)


def comparison(benchmark: str, scores: Sequence[Score]) -> str:
    """One line: the score beside what LLaVA-1.5 published, where it did."""
    here = "not scored here"
    if scores:
        name, value = next(iter(scores[-1].values.items()))
        here = f"{scores[-1].kind} {name} {value:.1f}"
    published = PUBLISHED.get(benchmark)
    beside = "LLaVA-1.5 7B {:.1f}, 13B {:.1f}".format(*published) if published else "none published"
    return f"{benchmark}: {here} ({beside})"


def write_report(folder: Path) -> Path:
    """report.md and report.json over every finished benchmark below `folder`."""
    results, rows, details = {}, [], []
    for mark in sorted(folder.rglob("run.json")):  # without it, a metrics.json is not of ours
        path = mark.with_name("metrics.json")
        if not path.exists():
            continue
        # The benchmark's name; before it a folder, where another --output lies inside this one.
        name = mark.parent.relative_to(folder).as_posix()
        try:
            metrics = results[name] = json.loads(path.read_text(encoding="utf-8"))
            scores = _scores(metrics)
            rows.append(_row(name, metrics, scores))
        except NOT_AS_EXPECTED as error:
            raise LlavaError(f"cannot read the result {path}: {error}; delete it") from None
        if scores:
            details.append(f"## {name}\n\n```\n{table(scores)}\n```\n")
    text = json.dumps(results, indent=2, ensure_ascii=False) + "\n"
    (folder / "report.json").write_text(text, encoding="utf-8")
    path = folder / "report.md"
    path.write_text("\n".join([*HEAD, *rows]) + "\n\n" + "\n".join(details), encoding="utf-8")
    return path


def _row(name: str, metrics: Mapping, scores: Sequence[Score]) -> str:
    """A line of the report's table."""
    metric, value = "to be graded", metrics.get("submission", "")
    if scores:
        of, number = list(scores[-1].values.items())[0]
        metric, value = f"{of}, {scores[-1].kind}", f"{number:.1f}"
    published = PUBLISHED.get(metrics["benchmark"])
    published = [f"{number:.1f}" for number in published] if published else ["", ""]
    cells = (name, f"{metrics['answers']:,}", metric, value, *published)
    return f"| {' | '.join(cells)} |"


def _scores(metrics: Mapping) -> list[Score]:
    """The lines of a metrics.json."""
    return [
        Score(kind, values["count"], {k: v for k, v in values.items() if k != "count"})
        for kind, values in metrics["scores"].items()
    ]
