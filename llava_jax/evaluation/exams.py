"""AI2D, MMStar, RealWorldQA, MMMU, CV-Bench and MuirBench: answers that name an option.

Prompts and readings are those of lmms-eval, with which LLaVA-OneVision was measured. The files
are the Parquet sets of the Hugging Face hub, with the pictures inside.
"""

import ast
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llava_jax.errors import LlavaError
from llava_jax.evaluation.benchmark import (
    Benchmark,
    Question,
    Score,
    ask,
    graded,
    grades_of,
    score_by_kind,
    score_of_sums,
)
from llava_jax.evaluation.files import Folder, each
from llava_jax.evaluation.letters import (
    bare,
    leading_letter,
    mmmu_letter,
    mmmu_open_is_right,
    option_letter,
)
from llava_jax.evaluation.multiple_choice import ALPHABET, with_options
from llava_jax.evaluation.short_answers import SHORT
from llava_jax.evaluation.statistics import columns_by_part, ratio

HUB = "https://huggingface.co/datasets"
DIRECTLY = "Answer with the option's letter from the given choices directly"  # no full stop: MMStar


def load_ai2d(root: Path) -> Benchmark:
    """AI2D (https://arxiv.org/abs/1603.07396) with masked labels: letters in the diagrams.

    The other published form shows the labels and gives about ten points more.
    """
    folder = Folder(root, f"{HUB}/lmms-lab/ai2d")
    rows = folder.parquet("test-*.parquet", "question", "options", "answer")

    def make(pair) -> Question:
        number, row = pair
        options, index = row["options"], int(row["answer"])
        return ask(
            number,
            f"{with_options(row['question'], options)}\n{DIRECTLY}.",
            row.picture("image"),
            reference=f"{ALPHABET[index]}. {options[index]}",
            label=ALPHABET[index],
        )

    questions = each(list(enumerate(rows)), root, make)
    grade = lambda q, text: float(bare(leading_letter(text)) == bare(q.label))
    return Benchmark("ai2d", folder.source, questions, **graded(grade))


def load_realworldqa(root: Path) -> Benchmark:
    """RealWorldQA of xAI: pictures from cars and streets; options or a short answer."""
    folder = Folder(root, f"{HUB}/lmms-lab/RealWorldQA")
    rows = folder.parquet("test-*.parquet", "question", "answer")

    def make(pair) -> Question:
        number, row = pair
        answer = row["answer"].strip()
        kind = "options" if answer.upper() in tuple("ABCD") else "open"
        picture = row.picture("image")
        return ask(number, row["question"].strip(), picture, reference=answer, kind=kind)

    questions = each(list(enumerate(rows)), root, make)
    return Benchmark("realworldqa", folder.source, questions, **graded(grade_realworldqa))


def grade_realworldqa(question: Question, text: str) -> float:
    """The letter of an option, or a short answer in any case without a full stop at its end."""
    if question.kind == "options":
        return float(option_letter(text) == question.reference.upper())
    return float(text.lower().strip().rstrip(".") == question.reference.lower())


def load_mmstar(root: Path) -> Benchmark:
    """MMStar (https://arxiv.org/abs/2403.20330): questions that cannot be answered blindly.

    A category's score is the mean over its sub-categories, `average` the mean over all of them.
    """
    folder = Folder(root, f"{HUB}/Lin-Chen/MMStar")
    rows = folder.parquet("*.parquet", "index", "question", "answer", "category", "l2_category")

    def make(row) -> Question:
        return ask(
            row["index"],
            f"{row['question'].strip()}\n{DIRECTLY}",
            row.picture("image"),
            reference=row["answer"].strip().upper(),
            kind=row["category"],
            label=row["l2_category"],
        )

    questions = each(rows, root, make)
    return Benchmark("mmstar", folder.source, questions, grade_mmstar, score_mmstar)


def grade_mmstar(question: Question, text: str) -> float:
    return float(option_letter(text) == question.reference)


def score_mmstar(questions: Sequence[Question], predictions: Sequence[str]) -> list[Score]:
    """A line per category, and their average."""
    rights = np.array(grades_of(grade_mmstar, questions, predictions))
    kinds = np.array([question.kind for question in questions])
    lines = []
    for kind in [*dict.fromkeys(kinds), "average"]:
        own = np.flatnonzero((kinds == kind) | (kind == "average"))
        parts = np.array([f"{questions[i].kind}/{questions[i].label}" for i in own])
        names = list(dict.fromkeys(parts))
        right_and_all = np.stack([rights[own], np.ones(len(own))], axis=1)
        columns = columns_by_part(right_and_all, parts, names)
        units = [questions[i].unit for i in own]
        lines.append(score_of_sums(str(kind), len(own), units, columns, _mean_of_parts))
    return lines


def _mean_of_parts(sums: np.ndarray) -> dict[str, np.ndarray]:
    """sums: [R, 2 parts], of each part right and all."""
    right, asked = np.moveaxis(sums.reshape(len(sums), -1, 2), -1, 0)
    return {"accuracy": ratio(right, asked).mean(1)}


def load_mmmu(root: Path, seed: int) -> Benchmark:
    """MMMU's validation questions (https://arxiv.org/abs/2311.16502), of 30 college subjects.

    The pictures stand before the text, which refers to them as <image 1>, <image 2>. If no option
    can be read in an answer, one is drawn: by the official scorer at random, here by `seed` and
    the question's id.
    """
    folder = Folder(root, f"{HUB}/lmms-lab/MMMU (or MMMU/MMMU)")
    columns = ("id", "question", "options", "answer", "question_type")
    rows = folder.parquet("validation-*.parquet", *columns, folders=("", "data", "*"))

    def make(row) -> Question:
        options = dict(zip(ALPHABET, _literal(row["options"]), strict=False))
        if row["question_type"] == "multiple-choice":
            text = f"{with_options(row['question'], [*options.values()])}\n\n{DIRECTLY}."
            if row["answer"] not in options:
                raise LlavaError(f"the answer {row['answer']!r} is not among the options")
            label = (row["answer"], options)
        else:
            text, label = f"{row['question']}\n\n{SHORT}", (_answers(row["answer"]), None)
        named = sorted(i for i in range(1, 8) if f"<image {i}>" in text)
        return ask(
            row["id"],
            text,
            [row.picture(f"image_{i}") for i in named] or None,
            reference=row["answer"],
            kind=row["id"].split("_", 1)[1].rpartition("_")[0],
            label=label,
        )

    def grade(question: Question, text: str) -> float:
        answer, options = question.label
        if options is None:
            return float(mmmu_open_is_right(text, answer))
        return float(mmmu_letter(text, options, f"{seed}/{question.id}") == answer)

    questions = each(rows, root, make)
    return Benchmark("mmmu", folder.source, questions, **graded(grade))


def _literal(text: str) -> list[str]:
    """The options: a list in Python's notation, stored as text."""
    options = ast.literal_eval(text)
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise LlavaError(f"the options are not a list of texts: {text!r}")
    return options


def _answers(text: str) -> list[str]:
    """The answers to an open question: one text, or a list of them in Python's notation."""
    return _literal(text) if text.startswith("[") and text.endswith("]") else [text]


CVBENCH_NOTE = (
    "Note: You only need to respond with {} without providing any additional information."
)


def load_cvbench(root: Path) -> Benchmark:
    """CV-Bench (https://arxiv.org/abs/2406.16860): relations of objects in 2D and 3D.

    The score is the mean of 2D, itself the mean of ADE20K and COCO, and of 3D (Omni3D).
    """
    folder = Folder(root, f"{HUB}/nyu-visionx/CV-Bench")
    rows = folder.parquet("test*.parquet", "idx", "prompt", "choices", "answer", "source")

    def make(row) -> Question:
        if row["source"] not in CVBENCH_SHARES:
            raise LlavaError(f"the source {row['source']!r} is none of {', '.join(CVBENCH_SHARES)}")
        letters = ", ".join(ALPHABET[: len(row["choices"])])
        return ask(
            row["idx"],
            f"{CVBENCH_NOTE.format(letters)}\n\n{row['prompt']}",
            row.picture("image"),
            reference=row["answer"].strip("()"),
            kind=row["source"],
        )

    questions = each(rows, root, make)
    return Benchmark("cvbench", folder.source, questions, grade_cvbench, score_cvbench)


CVBENCH_SHARES = {"ADE20K": 0.25, "COCO": 0.25, "Omni3D": 0.5}


def grade_cvbench(question: Question, text: str) -> float:
    """1 if the first letter, after brackets and spaces, is that of the right option."""
    match = re.match(r"[(\s]*([A-Z])", text.strip(), re.IGNORECASE)
    return float(bool(match) and match[1].upper() == question.reference)


def score_cvbench(questions: Sequence[Question], predictions: Sequence[str]) -> list[Score]:
    """A line per source, all, and the weighted mean of the sources."""
    rights = grades_of(grade_cvbench, questions, predictions)
    sources = [source for source in CVBENCH_SHARES if source in {q.kind for q in questions}]
    shares = np.array([CVBENCH_SHARES[source] for source in sources])
    right_and_all = np.stack([rights, np.ones(len(rights))], axis=1)
    kinds = np.array([question.kind for question in questions])
    columns = columns_by_part(right_and_all, kinds, sources)

    def metrics(sums: np.ndarray) -> dict[str, np.ndarray]:
        right, asked = np.moveaxis(sums.reshape(len(sums), -1, 2), -1, 0)
        return {"accuracy": ratio(right, asked) @ shares / shares.sum()}

    units = [question.unit for question in questions]
    mean = score_of_sums("2D and 3D", len(rights), units, columns, metrics)
    return [*score_by_kind(questions, rights), mean]


def load_muirbench(root: Path) -> Benchmark:
    """MuirBench (https://arxiv.org/abs/2406.09411): questions about several pictures.

    The texts say with <image> where each picture stands.
    """
    folder = Folder(root, f"{HUB}/MUIRBENCH/MUIRBENCH")
    rows = folder.parquet("test-*.parquet", "idx", "question", "options", "answer", "task")

    def make(row) -> Question:
        return ask(
            row["idx"],
            f"{with_options(row['question'], row['options'])}\n{DIRECTLY}.",
            row.pictures("image_list"),
            reference=row["answer"],
            kind=row["task"],
            inline=True,
        )

    def score(questions: Sequence[Question], predictions: Sequence[str]) -> list[Score]:
        return score_by_kind(questions, grades_of(grade_muirbench, questions, predictions))

    questions = each(rows, root, make)
    return Benchmark("muirbench", folder.source, questions, grade_muirbench, score)


def grade_muirbench(question: Question, text: str) -> float:
    """The letter before a full stop at the start, or the bare letter in any case."""
    return float(leading_letter(text).strip().lower() == question.reference.strip().lower())
