"""A benchmark as the runner sees it: questions, a metric, and the file that its server takes."""

import dataclasses
import hashlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llava_jax.data.boxes import Boxes
from llava_jax.data.video import Video
from llava_jax.errors import LlavaError
from llava_jax.evaluation.parquet import StoredPicture
from llava_jax.evaluation.statistics import bootstrap_errors, percent, standard_error
from llava_jax.text.conversation import IMAGE_TOKEN, MARKS, images_in

Picture = str | bytes | StoredPicture | Video


@dataclass(frozen=True)
class Question:
    """One question and the expected answer.

    Attributes:
      id: unique in the benchmark.
      text: the question for people.
      prompt: the question for the model, with an `<image>` for each picture; the checkpoint's
        template is put around it.
      reference: the expected answer for people; empty if labels are hidden.
      images: for each `<image>` a path, encoded bytes, a picture in a Parquet file, or a video.
      image_name: the name of the picture in reports.
      kind: the group under which the question is scored.
      label: whatever the benchmark's own metric and submission need.
      group: name of a set of questions that belong together, such as a pair of pictures.
    """

    id: str
    text: str
    prompt: str
    reference: str
    images: tuple[Picture, ...]
    image_name: str
    kind: str
    label: Any = None
    group: str = ""

    @property
    def unit(self) -> str:
        """The questions that are not independent of this one share its unit (see `statistics`)."""
        return self.group or self.image_name or self.id

    def read_images(self) -> tuple[str | bytes | Video, ...]:
        """The pictures as paths or encoded bytes, videos as they are."""
        return tuple(i.read() if isinstance(i, StoredPicture) else i for i in self.images)


@dataclass(frozen=True)
class Score:
    """One line of a result table.

    Attributes:
      values: by name of the metric; shares in percent, points as the benchmark counts them.
      errors: the standard errors of those values for which one is known, in the same units.
    """

    kind: str
    count: int
    values: Mapping[str, float]
    errors: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Benchmark:
    """Questions and their metric.

    Attributes:
      name: also the name of the folder of its results.
      source: where its files are published.
      grade: how right one answer is, from 0 to 1; None if labels are hidden.
      score: questions and their answers -> lines of the result table. The published figure is the
        first value of the last line. None if labels are hidden.
      submit: writes the official file of answers into a folder and returns its path.
      draw: draws on a picture what its question and answer mean, for the page of failures.
      by_boxes: (the benchmark, how a model writes boxes) -> the benchmark for that model; None if
        no question or answer has a box.
      fingerprint: hash of the questions, by which results of other questions are recognised.
    """

    name: str
    source: str
    questions: Sequence[Question]
    grade: Callable[[Question, str], float] | None = None
    score: Callable[[Sequence[Question], Sequence[str]], list[Score]] | None = None
    submit: Callable[[Sequence[Question], Sequence[str], Path], Path] | None = None
    draw: Callable[[Image.Image, Question, str], Image.Image] | None = None
    by_boxes: Callable[["Benchmark", Boxes], "Benchmark"] | None = None
    fingerprint: str = field(default="")

    def __post_init__(self):
        if not self.questions:
            raise LlavaError(f"{self.name}: its files hold no question")
        names = [question.id for question in self.questions]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise LlavaError(f"{self.name}: two questions have the id {twice!r}")
        if not self.fingerprint:
            object.__setattr__(self, "fingerprint", fingerprint(self.questions))

    def reading(self, boxes: Boxes) -> "Benchmark":
        """The benchmark for a model that writes boxes so."""
        return self.by_boxes(self, boxes)

    def first(self, limit: int) -> "Benchmark":
        """The first `limit` questions as a benchmark with its own name and no submission.

        If answers count only together with others (MME, MMBench), those asked are all that count.
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


def ask(
    id: Any,
    text: str,
    image: Picture | Sequence[Picture] | None,
    image_name: str = "",
    reference: str = "",
    kind: str = "all",
    label: Any = None,
    group: str = "",
    inline: bool = False,
) -> Question:
    """A question in LLaVA's form: the pictures, a line break, the text.

    (7, "What is it?", "a.jpg") -> the prompt "<image>\\nWhat is it?"; of two pictures
    "<image> <image>\\nWhat is it?". With `inline` the text itself has an <image> for each picture.
    """
    if image is None:
        images = ()
    else:
        images = (image,) if isinstance(image, Picture) else tuple(image)
    if inline:
        if (count := images_in(text)) != len(images):
            raise LlavaError(f"its text has {count} {IMAGE_TOKEN} for {len(images)} pictures")
        prompt = text
    else:
        text = MARKS.sub("", text)  # otherwise it would ask for a picture
        prompt = f"{' '.join([IMAGE_TOKEN] * len(images))}\n{text}" if images else text
    name = image_name or ", ".join(dict.fromkeys(map(_name, images)))
    return Question(str(id), text, prompt, reference, images, name, kind, label, group)


def _name(image: Picture) -> str:
    if isinstance(image, StoredPicture):
        return image.name
    path = image.source if isinstance(image, Video) else image
    return path if isinstance(path, str) else ""


def fingerprint(questions: Sequence[Question]) -> str:
    """SHA-256 in hex of all questions and references; pictures count by file name only."""
    digest = hashlib.sha256()
    for q in questions:
        name = q.image_name.rpartition("/")[2]
        digest.update(repr((q.id, q.prompt, name, q.kind, q.reference)).encode())
    return digest.hexdigest()


def mean_score(
    kind: str, questions: Sequence[Question], grades: Sequence[float], name: str = "accuracy"
) -> Score:
    """One line: the mean grade in percent and its standard error."""
    units = [question.unit for question in questions]
    return Score(kind, len(grades), {name: percent(grades)}, {name: standard_error(grades, units)})


def score_of_sums(
    kind: str,
    count: int,
    units: Sequence[str],
    rows: np.ndarray,
    metrics: Callable[[np.ndarray], Mapping[str, np.ndarray]],
) -> Score:
    """One line of metrics that are functions of sums, with bootstrap standard errors.

    Args:
      rows: [n, C], what each question, or each group of them, adds to the C sums.
      units: [n], the unit of each row.
      metrics: sums [R, C] -> {name: values [R]}.
    """
    values = {name: float(value[0]) for name, value in metrics(rows.sum(0)[None]).items()}
    return Score(kind, count, values, bootstrap_errors(units, rows, metrics))


def score_by_kind(
    questions: Sequence[Question], grades: Sequence[float], name: str = "accuracy"
) -> list[Score]:
    """The mean grade of each kind of question, in order of appearance, and of all."""
    groups = defaultdict(list)
    for question, grade in zip(questions, grades, strict=True):
        groups[question.kind].append((question, grade))
    lines = [
        mean_score(kind, *zip(*pairs, strict=True), name)
        for kind, pairs in groups.items()
        if set(groups) != {"all"}
    ]
    return [*lines, mean_score("overall", questions, grades, name)]


def grades_of(
    grade: Callable[[Question, str], float],
    questions: Sequence[Question],
    predictions: Sequence[str],
) -> list[float]:
    return [grade(question, text) for question, text in zip(questions, predictions, strict=True)]


def graded(grade: Callable[[Question, str], float], name: str = "accuracy") -> dict[str, Callable]:
    """`grade` and `score` of a benchmark whose score is the mean grade, called `name`."""

    def score(questions, predictions) -> list[Score]:
        return score_by_kind(questions, grades_of(grade, questions, predictions), name)

    return {"grade": grade, "score": score}
