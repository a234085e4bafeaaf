"""Standard errors and paired tests against textbook values and independent formulas."""

import numpy as np
import pytest

from llava_jax.evaluation.statistics import (
    bootstrap_errors,
    columns_by_part,
    mcnemar,
    permutation_test,
    ratio,
    standard_error,
)


def test_one_question_a_picture_has_the_binomial_error():
    grades = [1.0] * 30 + [0.0] * 70
    assert standard_error(grades, range(100)) == pytest.approx(100 * (0.3 * 0.7 / 100) ** 0.5)


def test_questions_of_one_picture_count_as_one():
    grades = [1.0] * 30 + [0.0] * 70
    twice = standard_error(grades * 2, [*range(100), *range(100)])
    assert twice == pytest.approx(standard_error(grades, range(100)))
    # Cluster-robust error of a mean, by hand: three pictures, residual sums 1, -0.5, -0.5.
    units = ["a", "a", "b", "c"]
    assert standard_error([1, 1, 0, 0], units) == pytest.approx(100 * np.sqrt(1.5) / 4)


def test_the_bootstrap_of_a_mean_is_its_standard_error():
    rng = np.random.default_rng(1)
    grades, units = rng.integers(0, 2, 400).astype(float), rng.integers(0, 150, 400)
    counts = np.stack([grades, np.ones(400)], axis=1)
    errors = bootstrap_errors(units, counts, lambda s: {"accuracy": ratio(s[:, 0], s[:, 1])})
    assert errors["accuracy"] == pytest.approx(standard_error(grades, units), rel=0.1)
    again = bootstrap_errors(units, counts, lambda s: {"accuracy": ratio(s[:, 0], s[:, 1])})
    assert again == errors


def test_each_part_has_columns_of_its_own():
    rows, parts = np.array([[1, 1], [0, 1], [1, 0]]), np.array(["a", "b", "c"])
    assert columns_by_part(rows, parts, ["a", "b"]).tolist() == [
        [1, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]  # fmt: skip


def test_nothing_is_divided_by_zero():
    assert ratio(np.array([1.0, 2.0]), np.array([0.0, 4.0])).tolist() == [0.0, 50.0]


def test_mcnemar_is_the_exact_binomial_test():
    assert mcnemar(0, 0) == 1 and mcnemar(3, 3) == 1
    assert mcnemar(0, 5) == pytest.approx(2 / 32)
    assert mcnemar(2, 8) == mcnemar(8, 2) == pytest.approx(2 * (1 + 10 + 45) / 1024)


def test_the_permutation_test_agrees_with_mcnemar_and_is_seeded():
    differences = [1.0] * 12 + [-1.0] * 3 + [0.0] * 50
    p = permutation_test(differences, range(65))
    assert p == pytest.approx(mcnemar(3, 12), abs=0.01)
    assert permutation_test(differences, range(65)) == p
    assert permutation_test([0.0] * 9, range(9)) == 1
    # The same 15 answers about two pictures say far less.
    assert permutation_test(differences, [0] * 60 + [1] * 5) > 0.4
