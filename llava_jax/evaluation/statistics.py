"""Standard errors of scores, and tests of whether two models differ.

Questions about one picture are not independent, so every formula here works on *units*: groups of
questions that share a picture (or a set of pictures). With one question per unit the formulas are
the textbook ones: the binomial standard error and McNemar's test.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from math import comb, sqrt

import numpy as np

DRAWS = 1_000  # of a bootstrap
PERMUTATIONS = 10_000
SEED = 0


def percent(grades: Sequence[float]) -> float:
    """The mean in percent."""
    return 100 * float(np.mean(grades))


def standard_error(grades: Sequence[float], units: Sequence[Hashable]) -> float:
    """Standard error of the mean grade, in percent, with questions clustered by unit.

    sqrt(sum over units u of (sum over i in u of (g_i - mean))^2) / n. With one question a unit and
    grades of 0 or 1 this is the binomial sqrt(p (1 - p) / n).
    """
    grades = np.asarray(grades, float)
    sums = sum_by_unit((grades - grades.mean())[:, None], units)
    return 100 * sqrt(float((sums**2).sum())) / len(grades)


def bootstrap_errors(
    units: Sequence[Hashable],
    counts: np.ndarray,
    metrics: Callable[[np.ndarray], Mapping[str, np.ndarray]],
) -> dict[str, float]:
    """Standard errors of metrics that are functions of sums, such as F1.

    Units are drawn with replacement, `DRAWS` times from a fixed seed, and the metrics computed of
    each draw; their standard deviations are the errors.

    Args:
      counts: [n, C], what each question adds to the C sums.
      metrics: sums [R, C] -> {name: values [R]}.
    """
    rows = sum_by_unit(counts, units)
    rng, count = np.random.default_rng(SEED), len(rows)
    drawn = np.stack([rng.multinomial(count, np.full(count, 1 / count)) @ rows
                      for _ in range(DRAWS)])  # fmt: skip
    return {name: float(np.std(values)) for name, values in metrics(drawn).items()}


def sum_by_unit(rows: np.ndarray, units: Sequence[Hashable]) -> np.ndarray:
    """Rows [n, C] added up by unit -> [units, C], in order of appearance."""
    numbers: dict[Hashable, int] = {}
    index = np.array([numbers.setdefault(unit, len(numbers)) for unit in units])
    sums = np.zeros((len(numbers), rows.shape[1]))
    np.add.at(sums, index, rows)
    return sums


def columns_by_part(rows: np.ndarray, parts: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Gives each part columns of its own: rows [n, C], part of each row [n] -> [n, names * C].

    [[1, 1], [0, 1]] of the parts a, b -> [[1, 1, 0, 0], [0, 0, 0, 1]].
    """
    return (rows[:, None] * (parts[:, None] == list(names))[..., None]).reshape(len(rows), -1)


def ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """above / below in percent; 0 where `below` is 0."""
    return 100 * np.divide(above, below, out=np.zeros_like(above, float), where=below > 0)


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided exact p of McNemar's test, from the questions that one model alone got right.

    If the models were equally good, each such question would fall to either with chance 1/2.
    """
    n, k = only_a + only_b, min(only_a, only_b)
    return min(1.0, 2 * sum(comb(n, i) for i in range(k + 1)) / 2**n)


def permutation_test(differences: Sequence[float], units: Sequence[Hashable]) -> float:
    """Two-sided p of the mean difference: the sign of each unit's sum is flipped at random.

    With `PERMUTATIONS` draws from a fixed seed; the observed signs count as one more draw, so p
    is never 0.
    """
    sums = sum_by_unit(np.asarray(differences, float)[:, None], units)[:, 0]
    observed = abs(sums.sum())
    rng, extreme = np.random.default_rng(SEED), 1
    for _ in range(PERMUTATIONS):
        signs = rng.integers(0, 2, len(sums)) * 2 - 1
        extreme += abs(float(signs @ sums)) >= observed - 1e-9
    return extreme / (PERMUTATIONS + 1)
