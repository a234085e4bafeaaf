"""`llava-jax compare`: the paired test, and what cannot be compared."""

import json
from pathlib import Path

import pytest

from llava_jax import cli
from llava_jax.errors import LlavaError
from llava_jax.evaluation.compare import compare


def result(folder: Path, grades, images=None, questions="abc", **changes) -> Path:
    """A finished result of eval.py."""
    folder.mkdir(parents=True)
    run = {"benchmark": "pope", "questions": questions}
    lines = [
        {"id": f"q{i}", "prediction": "", "image": images[i] if images else f"{i}.jpg",
         "grade": grade} | changes
        for i, grade in enumerate(grades)
    ]  # fmt: skip
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "metrics.json").write_text(json.dumps(run))
    (folder / "predictions.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return folder


def test_one_question_a_picture_is_mcnemars_test(tmp_path):
    a = result(tmp_path / "a", [1, 1, 0, 0, 0, 0, 0, 0, 0, 1])
    b = result(tmp_path / "b", [1, 1, 1, 1, 1, 1, 1, 0, 0, 0])
    ((line,), _) = compare(a, b)
    assert (line.name, line.count, line.only_a, line.only_b) == ("pope", 10, 1, 5)
    assert (line.a, line.b, line.test) == (30, 70, "McNemar")
    assert line.p == pytest.approx(2 * (1 + 6) / 64)
    ((back,), _) = compare(b, a)
    assert back.p == line.p and back.error == pytest.approx(line.error)


def test_questions_about_one_picture_are_permuted_together(tmp_path):
    images = ["x.jpg"] * 8 + ["y.jpg"] * 2
    a = result(tmp_path / "a", [0] * 10, images)
    b = result(tmp_path / "b", [1] * 8 + [0, 0], images)
    ((line,), _) = compare(a, b)
    # Eight better answers, but about a single picture: no evidence at all.
    assert line.test == "permutation" and line.p == 1
    c = result(tmp_path / "c", [0.3] * 10)
    assert compare(c, result(tmp_path / "d", [0.9] * 10))[0][0].test == "permutation"


def test_all_benchmarks_of_two_runs(tmp_path, capsys):
    for run, grade in (("a", 0), ("b", 1)):
        for name in ("pope", "gqa/val"):
            result(tmp_path / run / name, [grade] * 8)
    result(tmp_path / "b" / "mme", [1, 1])
    assert cli.main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == "benchmark n A B B - A only A only B p test".split()
    assert rows[0].split() == "pope 8 0.0 100.0 +100.0 ±0.0 0 8 0.0078 McNemar".split()
    # A benchmark that a judge grades does not keep the others from being compared.
    for run in ("a", "b"):
        result(tmp_path / run / "mmvet", [None] * 2)
    differences, (reason,) = compare(tmp_path / "a", tmp_path / "b")
    assert len(differences) == 2 and "mmvet/predictions.jsonl has no grades" in reason


@pytest.mark.parametrize(
    "other, message",
    [
        ({"questions": "other"}, "answer different questions"),
        ({"grades": [1, 1, 1]}, "answers to different questions"),
        ({"grade": "x"}, "grades"),
    ],
)
def test_results_that_cannot_be_compared_are_refused(tmp_path, other, message):
    a = result(tmp_path / "a", [1, 0])
    b = result(tmp_path / "b", other.pop("grades", [1, 0]), **other)
    with pytest.raises(LlavaError, match=message):
        compare(a, b)


def test_a_result_without_grades_names_the_remedy(tmp_path, capsys):
    a = result(tmp_path / "a", [1, 0])
    b = result(tmp_path / "b", [1, 0])
    lines = [json.loads(line) for line in (b / "predictions.jsonl").open()]
    for line in lines:
        del line["grade"]
    (b / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert cli.main(["compare", str(a), str(b)]) == 1
    assert "b/predictions.jsonl has no grades: run eval.py" in capsys.readouterr().err
    with pytest.raises(LlavaError, match="evaluation holds no finished result"):
        compare(a, Path(__file__).parent)
    with pytest.raises(LlavaError, match="have no benchmark in common"):
        compare(a, tmp_path)
    with pytest.raises(LlavaError, match="no folder .*nothing"):
        compare(a, tmp_path / "nothing")
