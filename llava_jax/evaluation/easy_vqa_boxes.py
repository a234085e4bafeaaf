"""Pointing on easy-VQA: where is the shape, and what is at this box (`quickstart.boxes`).

`where` is right if the box in the answer has an IoU of at least 0.5 with the true one, `what` if
the answer equals the reference. Of `where` the mean IoU is shown as well, and the share of boxes
whose centre is in the true one: of a mosaic, that it points at the right shape.
"""

import dataclasses
from pathlib import Path

from llava_jax.data.boxes import Boxes
from llava_jax.data.media import inspect_image
from llava_jax.data.published import read_json
from llava_jax.data.record_boxes import placed_boxes
from llava_jax.data.records import check_record, open_records
from llava_jax.errors import LlavaError
from llava_jax.evaluation import easy_vqa
from llava_jax.evaluation.benchmark import Benchmark, Question, Score, mean_score
from llava_jax.evaluation.files import Folder, each
from llava_jax.evaluation.refcoco import Metric
from llava_jax.text.conversation import IMAGE_TOKEN

SOURCE = "https://github.com/vzhou842/easy-VQA (`python -m llava_jax.quickstart.boxes` writes it)"


def load(root: Path, split: str) -> Benchmark:
    """The benchmark over boxes/SPLIT.json below the quickstart's folder."""
    path = Folder(root, SOURCE).path(f"boxes/{split}.json")
    records = open_records(path, root)

    def make(pair) -> Question:
        item, record = pair
        check_record(record, records.image_root)
        if len(record.turns) != 2 or len(record.boxes) != 1 or len(record.images) != 1:
            raise LlavaError("expected one question and one answer about one box of one picture")
        size = inspect_image(record.images[0], record.image_names[0])
        label = (record.boxes[0].pixels(size), size, record)
        name, kind = record.image_names[0], item["kind"]
        return Question(record.id, "", "", "", record.images, name, kind, label)

    questions = each(list(zip(read_json(path), records, strict=True)), path, make)
    benchmark = Benchmark(
        f"easy_vqa_boxes/{split}",
        SOURCE,
        questions,
        by_boxes=_written,
        fingerprint=records.fingerprint(),
    )
    return benchmark.reading(Boxes())


def _written(benchmark: Benchmark, boxes: Boxes) -> Benchmark:
    """Questions and references in which boxes are written as a model does."""
    metric, questions = Metric(boxes), []
    for question in benchmark.questions:
        _, size, record = question.label
        asked, answer = placed_boxes(record.turns, record.boxes, [size], boxes)
        text = asked.text.replace(IMAGE_TOKEN, "").strip()
        questions.append(
            dataclasses.replace(question, text=text, prompt=asked.text, reference=answer.text)
        )

    def is_where(question: Question) -> bool:
        return question.kind.startswith("where")

    def grade(question: Question, text: str) -> float:
        right = metric.grade if is_where(question) else easy_vqa.grade
        return right(question, text)

    def score(questions, predictions) -> list[Score]:
        lines, pairs = [], list(zip(questions, predictions, strict=True))
        for kind in dict.fromkeys(question.kind for question in questions):
            own = [pair for pair in pairs if pair[0].kind == kind]
            if kind.startswith("where"):
                (line,) = metric.score(*zip(*own, strict=True))
                kept = [{n: v[n] for n in ("accuracy", "centre", "mean IoU")}
                        for v in (line.values, line.errors)]  # fmt: skip
                lines.append(Score(kind, len(own), *kept))
            else:
                lines.append(mean_score(kind, [q for q, _ in own], [grade(*pair) for pair in own]))
        return [*lines, mean_score("overall", questions, [grade(*pair) for pair in pairs])]

    return dataclasses.replace(
        benchmark, questions=questions, grade=grade, score=score, draw=metric.draw
    )
