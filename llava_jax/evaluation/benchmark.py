"""What a benchmark is to the runner: questions, and a score for their answers."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Question:
    """One question as the model is asked it, and what is expected.

    Attributes:
      id: unique in the benchmark.
      text: the question as people read it.
      prompt: as the model reads it, `<image>` included; the checkpoint's template goes around it.
      images: paths or encoded bytes, one for each `<image>`.
      image_name: what reports call the picture.
      kind: the group that the score is told by.
    """

    id: str
    text: str
    prompt: str
    reference: str
    images: tuple[str | bytes, ...]
    image_name: str
    kind: str


@dataclass(frozen=True)
class Score:
    """One line of a result table: the share of `count` answers that are right, from 0 to 1."""

    kind: str
    count: int
    accuracy: float
    blind_accuracy: float | None = None


@dataclass(frozen=True)
class Benchmark:
    """Questions with their metric.

    Attributes:
      name: also the folder of its results.
      fingerprint: of the questions, so that results of others are not taken for theirs.
      score: predicted texts, one a question, to lines of the table; the last is over all.
    """

    name: str
    fingerprint: str
    questions: Sequence[Question]
    score: Callable[[Sequence[str]], list[Score]]


def score_by_kind(
    questions: Sequence[Question], right: Sequence[bool], blind: Mapping[str, float]
) -> list[Score]:
    """The share of right answers of each kind of question, in order of appearance, and `overall`.

    blind: by kind, what is reached without looking; may lack any.
    """
    counts, hits = Counter(), Counter()
    for question, hit in zip(questions, right, strict=True):
        for kind in (question.kind, "overall"):
            counts[kind] += 1
            hits[kind] += hit
    kinds = [kind for kind in counts if kind != "overall"] + ["overall"]
    return [Score(kind, counts[kind], hits[kind] / counts[kind], blind.get(kind)) for kind in kinds]
