"""What a benchmark is to the runner: questions, a metric, and the file its server wants."""

import dataclasses
import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from llava_jax.errors import LlavaError
from llava_jax.text.conversation import IMAGE_TOKEN


@dataclass(frozen=True)
class Question:
    """One question as the model is asked it, and what is expected.

    Attributes:
      id: unique in the benchmark.
      text: the question as people read it.
      prompt: as the model reads it, `<image>` included; the checkpoint's template goes around it.
      reference: the expected answer as people read it; empty where labels are hidden.
      images: paths or encoded bytes, one for each `<image>`.
      image_name: what reports call the picture.
      kind: the group that the score is told by.
      label: what the benchmark's own metric and submission read.
    """

    id: str
    text: str
    prompt: str
    reference: str
    images: tuple[str | bytes, ...]
    image_name: str
    kind: str
    label: Any = None


@dataclass(frozen=True)
class Score:
    """One line of a result table.

    Attributes:
      values: by name of the metric; shares in percent, points as the benchmark counts them.
    """

    kind: str
    count: int
    values: Mapping[str, float]


@dataclass(frozen=True)
class Benchmark:
    """Questions with their metric.

    Attributes:
      name: also the folder of its results.
      source: where its files are published.
      grade: how right one answer is, from 0 to 1; None where labels are hidden.
      score: questions and their answers to lines of the table; what is published is the first
        value of the last line. None where labels are hidden.
      submit: writes the official file of questions and answers into a folder and returns its path.
      draw: what a page of failures shows on a picture, of a question and its answer.
      fingerprint: of the questions, so that results of others are not taken for theirs.
    """

    name: str
    source: str
    questions: Sequence[Question]
    grade: Callable[[Question, str], float] | None = None
    score: Callable[[Sequence[Question], Sequence[str]], list[Score]] | None = None
    submit: Callable[[Sequence[Question], Sequence[str], Path], Path] | None = None
    draw: Callable[[Image.Image, Question, str], Image.Image] | None = None
    fingerprint: str = field(default="")

    def __post_init__(self):
        if not self.questions:
            raise LlavaError(f"{self.name}: there is no question in its files")
        names = [question.id for question in self.questions]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise LlavaError(f"{self.name}: two questions have the id {twice!r}")
        if not self.fingerprint:
            object.__setattr__(self, "fingerprint", fingerprint(self.questions))

    def first(self, limit: int) -> "Benchmark":
        """The benchmark cut to its first questions, without a submission, under a name of its own.

        Where one answer counts only with others (MME, MMBench) those asked are all that count.
        """
        if limit < 1:
            raise LlavaError(f"--limit must be at least 1, not {limit}")
        return dataclasses.replace(
            self,
            name=f"{self.name}-first-{limit}",
            questions=self.questions[:limit],
            submit=None,
            fingerprint="",
        )


@dataclass(frozen=True)
class Shard:
    """One of `count` equal parts of a benchmark, `index` from 1."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """`2/8` -> the second of eight."""
        index, _, count = text.partition("/")
        if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
            raise LlavaError(f"--shard must be i/n with i from 1 to n, such as 1/4, not {text!r}")
        return cls(int(index), int(count))

    def of(self, questions: Sequence[Question]) -> Sequence[Question]:
        """Neighbours stay together: they are often about one picture."""
        start, end = ((len(questions) * i) // self.count for i in (self.index - 1, self.index))
        return questions[start:end]

    @property
    def folder(self) -> str:
        return f"shard-{self.index}-of-{self.count}"


def ask(
    id: Any,
    text: str,
    image: str | bytes | None,
    image_name: str = "",
    reference: str = "",
    kind: str = "all",
    label: Any = None,
) -> Question:
    """A question as LLaVA-1.5 asks it: the picture, a line break, the text."""
    text = text.replace(IMAGE_TOKEN, "")  # a literal one would ask for a picture that is not there
    prompt = text if image is None else f"{IMAGE_TOKEN}\n{text}"
    images = () if image is None else (image,)
    name = image_name or (image if isinstance(image, str) else "")
    return Question(str(id), text, prompt, reference, images, name, kind, label)


def fingerprint(questions: Sequence[Question]) -> str:
    """SHA-256 of what is asked and expected, in hex; pictures by name, wherever they lie."""
    digest = hashlib.sha256()
    for q in questions:
        name = q.image_name.rpartition("/")[2]
        digest.update(repr((q.id, q.prompt, name, q.kind, q.reference)).encode())
    return digest.hexdigest()


def percent(grades: Sequence[float]) -> float:
    """The mean in percent."""
    return 100 * math.fsum(grades) / len(grades)


def score_by_kind(
    questions: Sequence[Question], grades: Sequence[float], overall: str = "overall"
) -> list[Score]:
    """The mean grade of each kind of question, in order of appearance, and of all."""
    groups = defaultdict(list)
    for question, grade in zip(questions, grades, strict=True):
        groups[question.kind].append(grade)
    lines = list(groups.items()) if set(groups) != {"all"} else []
    lines.append((overall, grades))
    return [Score(kind, len(group), {"accuracy": percent(group)}) for kind, group in lines]


def graded(grade: Callable[[Question, str], float]) -> dict[str, Callable]:
    """`grade` and `score` of a benchmark whose score is the mean grade."""

    def score(questions, predictions) -> list[Score]:
        pairs = zip(questions, predictions, strict=True)
        return score_by_kind(questions, [grade(question, text) for question, text in pairs])

    return {"grade": grade, "score": score}
