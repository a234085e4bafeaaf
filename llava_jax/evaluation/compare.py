"""`llava-jax compare A B`: whether two results of eval.py differ by more than chance.

Both models answered the same questions, so the test is paired: it looks only at the questions on
which the two grades differ.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llava_jax.errors import LlavaError
from llava_jax.evaluation.files import readable
from llava_jax.evaluation.report import aligned
from llava_jax.evaluation.statistics import (
    mcnemar,
    percent,
    permutation_test,
    standard_error,
)

HEAD = ("benchmark", "n", "A", "B", "B - A", "only A", "only B", "p", "test")


@dataclass(frozen=True)
class Difference:
    """Two results on the questions of one benchmark.

    Attributes:
      a, b: mean grades in percent.
      error: standard error of b - a, in percent, with questions clustered by picture.
      only_a, only_b: the number of questions on which that model has the higher grade.
      p: chance of a difference at least as large if the models were equally good.
      test: the name of the test.
    """

    name: str
    count: int
    a: float
    b: float
    error: float
    only_a: int
    only_b: int
    p: float
    test: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for name in ("A", "B"):
        parser.add_argument(
            name,
            type=Path,
            help="a folder that eval.py wrote: of one benchmark, or of all (RUN/eval)",
        )


class NoGrades(LlavaError):
    """A result without grades."""


def main(args: argparse.Namespace) -> int:
    differences, left_out = compare(args.A, args.B)
    print(aligned([HEAD, *map(_row, differences)], least=6))
    print(f"\nA: {args.A}\nB: {args.B}\nGrades are mean shares of right answers in percent.")
    for reason in left_out:
        print(f"left out: {reason}")
    return 0


def compare(a: Path, b: Path) -> tuple[list[Difference], list[str]]:
    """Compares the benchmarks that both folders hold, in order of name.

    Returns:
      The differences, and why a benchmark of both was left out: it has no grades.

    Raises:
      LlavaError: nothing can be compared, or the questions of a benchmark differ.
    """
    folders = [_results(folder) for folder in (a, b)]
    shared = sorted(set(folders[0]) & set(folders[1]))
    if not all(folders):
        empty = b if folders[0] else a
        raise LlavaError(f"{empty} holds no finished result of eval.py")
    if not shared:
        raise LlavaError(
            f"{a} and {b} have no benchmark in common: give two folders of one benchmark, or two "
            "that hold several"
        )
    differences, left_out = [], []
    for name in shared:
        try:
            differences.append(_difference(folders[0][name], folders[1][name]))
        except NoGrades as error:
            left_out.append(str(error))
    if not differences:
        raise LlavaError(left_out[0])
    return differences, left_out


def _results(root: Path) -> dict[str, Path]:
    """Folders with a finished result, by their path below `root`; "." for root itself."""
    if not root.is_dir():
        raise LlavaError(f"no folder {root}")
    marks = sorted(root.rglob("metrics.json"))
    return {
        mark.parent.relative_to(root).as_posix(): mark.parent
        for mark in marks
        if (mark.parent / "predictions.jsonl").exists()
    }


def _difference(a: Path, b: Path) -> Difference:
    runs = [_json(folder / "run.json") for folder in (a, b)]
    if runs[0].get("questions") != runs[1].get("questions"):
        raise LlavaError(f"{a} and {b} answer different questions: compare runs of one benchmark")
    left, right = _grades(a), _grades(b)
    if left.keys() != right.keys():
        raise LlavaError(f"{a} and {b} hold answers to different questions")
    grades = np.array([[left[id][0], right[id][0]] for id in left])
    units = [left[id][1] for id in left]
    differences = grades[:, 1] - grades[:, 0]
    only_a, only_b = int((differences < 0).sum()), int((differences > 0).sum())
    alone = len(set(units)) == len(units) and set(grades.flat) <= {0.0, 1.0}
    return Difference(
        runs[0].get("benchmark", a.name),
        len(grades),
        percent(grades[:, 0]),
        percent(grades[:, 1]),
        standard_error(differences, units),
        only_a,
        only_b,
        mcnemar(only_a, only_b) if alone else permutation_test(differences, units),
        "McNemar" if alone else "permutation",
    )


def _grades(folder: Path) -> dict[str, tuple[float, str]]:
    """id -> (grade, unit) of every answer."""
    path = folder / "predictions.jsonl"
    with readable(path):
        lines = [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]
    if not all(isinstance(line, dict) and _is_graded(line) for line in lines):
        raise NoGrades(
            f"{path} has no grades: run eval.py on this folder again (it asks nothing anew); a "
            "benchmark that a server or a judge grades has none"
        )
    return {
        line["id"]: (float(line["grade"]), line.get("group") or line.get("image") or line["id"])
        for line in lines
    }


def _is_graded(line: dict) -> bool:
    return isinstance(line.get("id"), str) and isinstance(line.get("grade"), int | float)


def _json(path: Path) -> dict:
    with readable(path):
        value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise LlavaError(f"{path} is not a file of eval.py")
    return value


def _row(line: Difference) -> Sequence[str]:
    p = f"{line.p:.4f}" if line.p >= 1e-4 else "<0.0001"
    return (
        line.name,
        f"{line.count:,}",
        f"{line.a:.1f}",
        f"{line.b:.1f}",
        f"{line.b - line.a:+.1f} ±{line.error:.1f}",
        f"{line.only_a:,}",
        f"{line.only_b:,}",
        p,
        line.test,
    )
