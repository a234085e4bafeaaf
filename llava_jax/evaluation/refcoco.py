"""RefCOCO, RefCOCO+ and RefCOCOg: the box of the object that a sentence describes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from llava_jax.data.boxes import Box, Boxes, draw_boxes
from llava_jax.data.importers.refer import REFERENCES, SOURCE, Reference, references
from llava_jax.errors import LlavaError
from llava_jax.evaluation.benchmark import Benchmark, Question, Score, ask, mean_score
from llava_jax.evaluation.files import MissingFile, each

IOU_THRESHOLD = 0.5
OTHER_THRESHOLDS = (0.1, 0.3, 0.7, 0.9)


def load(root: Path, name: str, split: str) -> Benchmark:
    """One split of one of the three sets.

    The question is that of LLaVA-1.5's training data; the answer is a box as the model writes them
    (`data.boxes`). It counts as right if its intersection over union (IoU) with the true box is at
    least 0.5. Reported as well: the share of boxes at other thresholds, of boxes whose centre is in
    the true box, and the mean IoU.
    """
    known = {name: [s for s in splits if s != "train"] for name, (_, splits) in REFERENCES.items()}
    if split not in known.get(name, ()):
        choices = "; ".join(f"{name}: {', '.join(splits)}" for name, splits in known.items())
        raise LlavaError(f"unknown set and split {name!r}, {split!r}: choose of {choices}")

    try:
        described = references(root, name, split)
    except MissingFile as error:
        raise MissingFile(f"{error} or set config.data_root to the folder that holds it") from None

    def make(one: Reference) -> Question:
        x, y, width, height = one.box
        return ask(
            one.key,
            "Please provide the bounding box coordinate of the region this sentence describes: "
            f"{one.sentence}.",
            str(root / one.image),
            reference=f"x {x:.0f} to {x + width:.0f}, y {y:.0f} to {y + height:.0f} pixels",
            label=((x, y, x + width, y + height), one.size),
        )

    questions = each(described, root / name, make)
    source = f"{SOURCE} (pictures: https://cocodataset.org, train2014)"
    benchmark = Benchmark(f"{name}/{split}", source, questions, by_boxes=_graded)
    return benchmark.reading(Boxes())


@dataclass(frozen=True)
class Metric:
    """Grades, scores and drawings of answers whose boxes are written as `boxes` says."""

    boxes: Boxes

    def predicted(self, question: Question, text: str) -> Box | None:
        """The first box in the answer in pixels of the picture, or None."""
        found = self.boxes.read(text, question.label[1])
        return found[0] if found else None

    def grade(self, question: Question, text: str) -> float:
        """1 if the IoU of the first box in the answer with the true box is at least 0.5."""
        box = self.predicted(question, text)
        return float(box is not None and iou(box, question.label[0]) >= IOU_THRESHOLD)

    def score(self, questions: Sequence[Question], predictions: Sequence[str]) -> list[Score]:
        """One line: accuracy at IoU 0.5 and at other thresholds, centre accuracy, mean IoU."""
        pairs = [
            (self.predicted(question, text), question.label[0])
            for question, text in zip(questions, predictions, strict=True)
        ]
        overlaps = [iou(box, truth) if box else 0.0 for box, truth in pairs]
        columns = {"accuracy": [float(o >= IOU_THRESHOLD) for o in overlaps]}
        columns |= {f"IoU {t}": [float(o >= t) for o in overlaps] for t in OTHER_THRESHOLDS}
        columns["centre"] = [float(bool(box) and centre_inside(box, truth)) for box, truth in pairs]
        columns["mean IoU"] = overlaps
        lines = [mean_score("overall", questions, grades, name) for name, grades in columns.items()]
        values, errors = {}, {}
        for line in lines:
            values |= line.values
            errors |= line.errors
        return [Score("overall", len(questions), values, errors)]

    def draw(self, image: Image.Image, question: Question, text: str) -> Image.Image:
        """The true box in green, the predicted box in red."""
        image = draw_boxes(image, [question.label[0]], "lime")
        predicted = self.predicted(question, text)
        return draw_boxes(image, [predicted] if predicted else [], "red")


def _graded(benchmark: Benchmark, boxes: Boxes) -> Benchmark:
    metric = Metric(boxes)
    return replace(benchmark, grade=metric.grade, score=metric.score, draw=metric.draw)


def centre_inside(box: Box, truth: Box) -> bool:
    """Whether the centre of `box` is in `truth`, its edges included."""
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    return truth[0] <= x <= truth[2] and truth[1] <= y <= truth[3]


def iou(a: Box, b: Box) -> float:
    """Intersection over union; a box with swapped corners has no area."""
    overlap = _area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    union = _area(a) + _area(b) - overlap
    return overlap / union if union else 0.0


def _area(box: Box) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])
