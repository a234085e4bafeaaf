"""Questions answered with yes or no: POPE, RePOPE and MME.

A model that hallucinates says yes too often. Every benchmark here therefore reports its share of
yes and its false-yes rate: of the questions whose right answer is no, the share answered with yes.
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llava_jax.errors import LlavaError
from llava_jax.evaluation.benchmark import Benchmark, Question, Score, ask, score_of_sums
from llava_jax.evaluation.files import Folder, each, readable
from llava_jax.evaluation.short_answers import SHORT
from llava_jax.evaluation.statistics import columns_by_part, ratio

POPE_SPLITS = ("adversarial", "popular", "random")
PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene",
              "landmark", "artwork", "OCR")  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation",
             "code_reasoning")  # fmt: skip


def yes_counts(said: Sequence[bool], true: Sequence[bool]) -> np.ndarray:
    """[n, 5]: of each answer, whether it counts as one of `yes_metrics`' five sums."""
    said, true = np.asarray(said, bool), np.asarray(true, bool)
    return np.stack([said & true, said, true, said == true, np.ones_like(said)], axis=1) * 1.0


def yes_metrics(sums: np.ndarray) -> dict[str, np.ndarray]:
    """Percentages from sums [..., 5]: said yes rightly, said yes, is yes, right, all.

    What would divide by zero is 0.
    """
    both, said, true, right, count = np.moveaxis(sums, -1, 0)
    return {
        "F1": ratio(2 * both, said + true),
        "accuracy": ratio(right, count),
        "precision": ratio(both, said),
        "recall": ratio(both, true),
        "yes": ratio(said, count),
        "false yes": ratio(said - both, count - true),
    }


def score_yes(kind: str, questions: Sequence[Question], said: Sequence[bool]) -> Score:
    """F1, accuracy, precision, recall, share of yes and false-yes rate of one group."""
    counts = yes_counts(said, [question.reference == "yes" for question in questions])
    units = [question.unit for question in questions]
    return score_of_sums(kind, len(questions), units, counts, yes_metrics)


def load_pope(root: Path) -> Benchmark:
    """POPE on COCO (https://arxiv.org/abs/2305.10355): is an object in the picture that is not?

    Scores by split. `mean` is the mean over splits, whose F1 LLaVA-1.5 reports; half of the right
    answers are yes.
    """
    # The version that LLaVA-1.5 was measured with: 2,910 questions in `random`, not 3,000.
    commit = "e3e39262c85a6a83f26cf5094022a782cb0df58d"
    source = f"https://github.com/AoiDragon/POPE/tree/{commit}/output/coco"
    return _pope("pope", Folder(root, source), "coco/coco_pope_{}.json")


def load_repope(root: Path) -> Benchmark:
    """RePOPE (https://arxiv.org/abs/2504.15707): POPE with wrong labels corrected.

    Questions whose answer is ambiguous are left out. Scores as for POPE.
    """
    folder = Folder(root, "https://github.com/YanNeu/RePOPE (annotations)")
    return _pope("repope", folder, "annotations/coco_repope_{}.json")


def _pope(name: str, folder: Folder, pattern: str) -> Benchmark:
    questions, pictures = [], folder.pictures("val2014", "../pope/val2014")
    for split in POPE_SPLITS:
        inside = pattern.format(split)
        path = folder.path(inside, inside.rpartition("/")[2])

        def make(item, split=split) -> Question:
            if item["label"] not in ("yes", "no"):
                raise LlavaError(f"the label {item['label']!r} is neither yes nor no")
            return ask(
                f"{split}/{item['question_id']}",
                f"{item['text']}\n{SHORT}",
                str(pictures / item["image"]),
                reference=item["label"],
                kind=split,
            )

        items = folder.json_lines(str(path.relative_to(folder.root)))
        questions += each(items, path, make)
    source = f"{folder.source} (pictures: https://cocodataset.org, val2014)"
    return Benchmark(name, source, questions, grade_pope, score_pope)


def pope_answer(text: str) -> str:
    """`no` if the first sentence has the word No, no or not, else `yes`: POPE's own reading."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def grade_pope(question: Question, text: str) -> float:
    return float(pope_answer(text) == question.reference)


def score_pope(questions: Sequence[Question], predictions: Sequence[str]) -> list[Score]:
    """A line per split, and their mean."""
    splits = list(dict.fromkeys(question.kind for question in questions))
    said = np.array([pope_answer(text) == "yes" for text in predictions])
    true = np.array([question.reference == "yes" for question in questions])
    kinds = np.array([question.kind for question in questions])
    lines = []
    for split in splits:
        members = np.flatnonzero(kinds == split)
        lines.append(score_yes(split, [questions[i] for i in members], said[members]))

    def mean(sums: np.ndarray) -> dict[str, np.ndarray]:
        parts = yes_metrics(sums.reshape(len(sums), len(splits), 5))
        return {name: values.mean(1) for name, values in parts.items()}

    counts = columns_by_part(yes_counts(said, true), kinds, splits)
    units = [question.unit for question in questions]
    return [*lines, score_of_sums("mean", len(questions), units, counts, mean)]


def load_mme(root: Path) -> Benchmark:
    """MME (https://arxiv.org/abs/2306.13394): two questions a picture, one of them true.

    A category's points are accuracy + accuracy+, the share of pictures with both right. LLaVA-1.5
    reports the sum over perception, of 2,000.
    """
    folder = Folder(root, "https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models")
    questions = []
    for category in COGNITION + PERCEPTION:
        path = folder.path(f"MME_Benchmark_release_version/{category}", category)
        nested = (path / "questions_answers_YN").is_dir()
        texts = path / "questions_answers_YN" if nested else path
        pictures = path / "images" if nested else path
        images = {p.stem: p for p in sorted(pictures.iterdir()) if p.suffix != ".txt"}
        files = sorted(texts.glob("*.txt"))
        if not files:  # the sum would silently lack this category
            raise LlavaError(f"{texts} has no questions: they are published at {folder.source}")
        for file in files:
            if file.stem not in images:
                raise LlavaError(f"{pictures} has no picture for the questions of {file.name}")
            questions += _mme_questions(file, images[file.stem], category)
    return Benchmark("mme", folder.source, questions, grade_mme, score_mme)


def _mme_questions(file: Path, image: Path, category: str) -> list[Question]:
    with readable(file):
        lines = [line for line in file.read_text("utf-8-sig").splitlines() if line.strip()]
    if len(lines) != 2:
        raise LlavaError(f"{file} has {len(lines)} questions, not two: is it the published file?")

    def make(line) -> Question:
        question, answer = line.strip().split("\t")
        if answer.lower() not in ("yes", "no"):
            raise LlavaError(f"the answer {answer!r} is neither Yes nor No")
        # LLaVA-1.5 asks for a short answer with the sentence of its training data.
        text = question.replace("Please answer yes or no.", "").strip()
        return ask(
            f"{category}/{image.name}/{lines.index(line)}",
            f"{text}\n{SHORT}",
            str(image),
            reference=answer.lower(),
            kind=category,
            label=f"{category}/{image.name}",
        )

    return each(lines, file, make)


def mme_answer(text: str) -> str:
    """yes, no or other: the word that MME's own scorer finds in the first four letters."""
    start = text.lower()[:4]
    return next((word for word in ("yes", "no") if word in start), "other")


def grade_mme(question: Question, text: str) -> float:
    return float(mme_answer(text) == question.reference)


def score_mme(questions: Sequence[Question], predictions: Sequence[str]) -> list[Score]:
    """Points by category, of cognition and of perception."""
    pictures = defaultdict(list)
    for question, text in zip(questions, predictions, strict=True):
        pictures[question.label].append((question, mme_answer(text)))
    first = [pairs[0][0] for pairs in pictures.values()]
    rows = np.array([_mme_row(pairs) for pairs in pictures.values()])
    kinds = np.array([question.kind for question in first])
    lines = [
        _mme_line(category, (category,), first, kinds, rows, accuracy=True)
        for category in dict.fromkeys(kinds)
    ]
    for name, members in (("cognition", COGNITION), ("perception", PERCEPTION)):
        asked = [category for category in members if category in kinds]
        if asked:
            lines.append(_mme_line(name, asked, first, kinds, rows, accuracy=False))
    return lines


def _mme_row(pairs: Sequence[tuple[Question, str]]) -> list[float]:
    """Seven counts of one picture's answers: right, all, pictures right, pictures, yes, ..."""
    right = [answer == question.reference for question, answer in pairs]
    negative = [answer == "yes" for question, answer in pairs if question.reference == "no"]
    yes = sum(answer == "yes" for _, answer in pairs)
    return [sum(right), len(right), all(right), 1, yes, sum(negative), len(negative)]


def _mme_line(
    name: str,
    members: Sequence[str],
    first: Sequence[Question],
    kinds: np.ndarray,
    rows: np.ndarray,
    accuracy: bool,
) -> Score:
    """The line of a group of categories, whose points add up.

    Args:
      first, kinds, rows: one question, the category and the counts [7] of each picture.
    """
    own = np.flatnonzero(np.isin(kinds, members))
    counts = columns_by_part(rows[own], kinds[own], members)

    def metrics(sums: np.ndarray) -> dict[str, np.ndarray]:
        parts = np.moveaxis(sums.reshape(-1, len(members), 7), -1, 0)
        right, count, both, pictures, yes, false_yes, negative = parts
        shares = {"accuracy": ratio(right, count), "accuracy+": ratio(both, pictures)}
        points = {"points": sum(shares.values())} | (shares if accuracy else {})
        return {name: values.sum(1) for name, values in points.items()} | {
            "yes": ratio(yes.sum(1), count.sum(1)),
            "false yes": ratio(false_yes.sum(1), negative.sum(1)),
        }

    count, units = int(rows[own, 1].sum()), [first[i].unit for i in own]
    return score_of_sums(name, count, units, counts, metrics)
