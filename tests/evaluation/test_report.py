"""Result tables, the line with the published scores, and the report over several benchmarks."""

import json

import pytest

from llava_jax.errors import LlavaError
from llava_jax.evaluation.benchmark import Score
from llava_jax.evaluation.report import comparison, table, write_report

POPE = [
    Score("random", 10, {"F1": 87.25, "accuracy": 88.0}),
    Score("mean", 30, {"F1": 85.0, "accuracy": 86.0}, {"F1": 0.6}),
]


def test_a_table_has_a_column_a_metric():
    lines = table([Score("existence", 60, {"points": 190.0, "accuracy": 95.0}),
                   Score("perception", 60, {"points": 1510.7})]).splitlines()  # fmt: skip
    assert lines[0].split() == ["kind", "n", "points", "accuracy"]
    assert lines[1].split() == ["existence", "60", "190.0", "95.0"]
    assert lines[2].split() == ["perception", "60", "1510.7"]


def test_the_score_is_next_to_the_published_ones():
    line = comparison("pope", POPE)
    assert line.startswith("pope: mean F1 85.0 ±0.6 (LLaVA-1.5 7B 85.9, 1.5 13B 85.9, 1.6 Vicuna")
    assert comparison("refcoco/val", POPE) == "refcoco/val: mean F1 85.0 ±0.6 (none published)"


def write(folder, benchmark, scores, **more):
    """A result as the runner leaves it."""
    folder.mkdir(parents=True)
    errors = {s.kind: s.errors for s in scores}
    scores = {s.kind: {"count": s.count, **s.values} for s in scores}
    metrics = {"benchmark": benchmark, "scores": scores, "answers": 1234, **more}
    if any(errors.values()):  # a result of before there were standard errors has none
        metrics["standard_errors"] = errors
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "run.json").write_text("{}")


def test_one_report_over_all(tmp_path):
    write(tmp_path / "pope", "pope", POPE)
    submission = {"submission": "vqav2_submission.json"}
    write(tmp_path / "vqav2/test-dev2015", "vqav2/test-dev2015", [], **submission)
    path = write_report(tmp_path)
    text = path.read_text()
    assert "| pope | 1,234 | F1, mean | 85.0 ±0.6 | 85.9 | 85.9 | 86.5 |" in text
    assert (
        "| vqav2/test-dev2015 | 1,234 | to be graded | vqav2_submission.json | 78.5 | 80.0 | 81.8 |"
        in (text)
    )
    assert "## pope" in text and table(POPE) in text
    assert set(json.loads((tmp_path / "report.json").read_text())) == {
        "pope",
        "vqav2/test-dev2015",
    }
    (tmp_path / "pope/metrics.json").write_text("{")
    with pytest.raises(LlavaError, match=r"cannot read the result .*metrics.json"):
        write_report(tmp_path)


def test_a_report_loses_no_result_and_takes_none_of_others(tmp_path):
    write(tmp_path / "pope", "pope", POPE)
    write(tmp_path / "13b/pope", "pope", [Score("mean", 30, {"F1": 95.0})])
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb/metrics.json").write_text('{"loss": 1.5}')
    (tmp_path / "seed").mkdir()  # a run that has not ended
    (tmp_path / "seed/run.json").write_text("{}")
    text = write_report(tmp_path).read_text()
    assert "| 13b/pope | 1,234 | F1, mean | 95.0 | 85.9 | 85.9 | 86.5 |" in text
    assert "| pope | 1,234 | F1, mean | 85.0 ±0.6 | 85.9 | 85.9 | 86.5 |" in text
    assert list(json.loads((tmp_path / "report.json").read_text())) == ["13b/pope", "pope"]
