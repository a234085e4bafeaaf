"""HallusionBench, NaturalBench and MMVP: an answer counts only with the answers to its pairs.

The same question is asked about two pictures with different answers, so that a model which always
says yes, or does not look, gets no pair right.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from llava_jax.errors import LlavaError
from llava_jax.evaluation.benchmark import Benchmark, Question, Score, ask, score_of_sums
from llava_jax.evaluation.files import Folder, each
from llava_jax.evaluation.multiple_choice import LETTER, with_options
from llava_jax.evaluation.short_answers import SHORT
from llava_jax.evaluation.statistics import ratio


def first_word(text: str, words: Sequence[str]) -> str:
    """Whichever of `words` comes first in the text as a word, in any case, or an empty text.

    ("No, there is. Yes?", ("yes", "no")) -> "no".
    """
    found = re.search(rf"\b({'|'.join(words)})\b", text, re.IGNORECASE)
    return next((word for word in words if word.lower() == found[1].lower()), "") if found else ""


def score_sets(
    kind: str,
    questions: Sequence[Question],
    rights: Sequence[float],
    parts: dict[str, Callable[[Question], str | None]],
    said_yes: Sequence[bool],
) -> Score:
    """One line: the share of parts with every answer right, for each way to divide the questions.

    Args:
      rights: the grade of each answer.
      parts: metric -> name of the part that a question belongs to, or None if to none. All
        questions of a part are of one group (`Question.group`), the unit of the standard errors.
      said_yes: whether each answer is yes; where nothing is asked for yes or no, empty.
    """
    members = {name: defaultdict(list) for name in parts}
    for i, question in enumerate(questions):
        for name, part in parts.items():
            if (key := part(question)) is not None:
                members[name][question.group, key].append(i)
    groups = list(dict.fromkeys(question.unit for question in questions))
    # Columns: right and all of each metric; said yes, all, said yes wrongly, right answer no.
    rows = np.zeros((len(groups), 2 * len(parts) + 4))
    row_of = {group: row for row, group in enumerate(groups)}
    for column, name in enumerate(parts):
        for indices in members[name].values():
            row = rows[row_of[questions[indices[0]].unit]]
            row[2 * column] += all(rights[i] == 1 for i in indices)
            row[2 * column + 1] += 1
    for question, yes in zip(questions, said_yes, strict=False):
        is_no = question.reference.lower() == "no"
        if is_no or question.reference.lower() == "yes":
            rows[row_of[question.unit], -4:] += (yes, 1, yes and is_no, is_no)

    def metrics(sums: np.ndarray) -> dict[str, np.ndarray]:
        values = {name: ratio(sums[:, 2 * i], sums[:, 2 * i + 1]) for i, name in enumerate(parts)}
        if len(said_yes):
            yes, count, false_yes, negative = sums[:, -4:].T
            values |= {"yes": ratio(yes, count), "false yes": ratio(false_yes, negative)}
        return values

    return score_of_sums(kind, len(questions), groups, rows, metrics)


def load_hallusionbench(root: Path) -> Benchmark:
    """HallusionBench (https://arxiv.org/abs/2310.14566), with answers read by rule.

    VD questions need their picture; VS questions are asked without one and with an original or an
    edited one. aAcc: questions; fAcc: pictures with every answer right; qAcc: the same question
    right in all its versions. A VS answer without a picture may also be neither yes nor no.
    Published scores were graded by GPT-4, which reads longer answers.
    """
    folder = Folder(root, "https://github.com/tianyi-lab/HallusionBench (hallusion_bench.zip)")
    pictures = folder.pictures("hallusion_bench", ".")

    def make(item) -> Question:
        category, subcategory = item["category"], item["subcategory"]
        figure, number = str(item["figure_id"]), str(item["question_id"])
        if str(item["gt_answer"]) not in ("0", "1"):
            raise LlavaError(f"the answer {item['gt_answer']!r} is neither 0 nor 1")
        group = f"{category}/{subcategory}/{item['set_id']}"
        seen = str(item["visual_input"]) != "0"
        picture = pictures / category / subcategory / f"{item['set_id']}_{figure}.png"
        return ask(
            f"{group}/{figure}/{number}",
            f"{item['question']}\n{SHORT}",
            str(picture) if seen else None,
            reference="yes" if str(item["gt_answer"]) == "1" else "no",
            kind=category,
            label=(figure, number),
            group=group,
        )

    questions = each(folder.json("HallusionBench.json"), root / "HallusionBench.json", make)
    return Benchmark(
        "hallusionbench", folder.source, questions, grade_hallusionbench, score_hallusionbench
    )


def grade_hallusionbench(question: Question, text: str) -> float:
    """1 if right; without a picture also for an answer that is neither yes nor no."""
    answer = first_word(text, ("yes", "no"))
    return float(answer == question.reference or (not answer and not question.images))


def score_hallusionbench(questions: Sequence[Question], predictions: Sequence[str]) -> list[Score]:
    """A line per category, and all."""
    rights = np.array(
        [grade_hallusionbench(q, text) for q, text in zip(questions, predictions, strict=True)]
    )
    yes = np.array([first_word(text, ("yes", "no")) == "yes" for text in predictions])
    parts = {
        "aAcc": lambda q: q.id,
        "fAcc": lambda q: q.label[0] if q.images else None,
        "qAcc": lambda q: q.label[1],
    }
    kinds = np.array([question.kind for question in questions])
    lines = []
    for kind in [*dict.fromkeys(kinds), "overall"]:
        own = np.flatnonzero((kinds == kind) | (kind == "overall"))
        members = [questions[i] for i in own]
        lines.append(score_sets(str(kind), members, rights[own], parts, yes[own]))
    return lines


NATURAL_SUFFIX = {
    "yes_no": "Please answer Yes or No.",
    "multiple_choice": "Please output the letter corresponding to the correct option.",
}
NATURAL_WORDS = {"yes_no": ("Yes", "No"), "multiple_choice": ("A", "B")}


def load_naturalbench(root: Path) -> Benchmark:
    """NaturalBench (https://arxiv.org/abs/2410.14669): two questions about each of two pictures.

    Each answer is right for one picture only. `group`: all four right; `question`: a question right
    for both pictures; `image`: both questions right for a picture.
    """
    folder = Folder(root, "https://huggingface.co/datasets/BaiqiL/NaturalBench (Parquet files)")
    texts = ("Question_0", "Question_1", "Question_Type")
    answers = tuple(f"Image_{i}_Question_{q}" for q in (0, 1) for i in (0, 1))
    rows = folder.parquet("*.parquet", *texts, *answers)

    def make(case) -> Question:
        number, row, q, i = case
        kind = row["Question_Type"]
        answer = row[f"Image_{i}_Question_{q}"]
        if answer not in NATURAL_WORDS[kind]:
            raise LlavaError(f"the answer {answer!r} is none of {NATURAL_WORDS[kind]}")
        return ask(
            f"{number}/q{q}/i{i}",
            f"{row[f'Question_{q}']} {NATURAL_SUFFIX[kind]}",
            row.picture(f"Image_{i}"),
            reference=answer,
            kind=kind,
            label=(f"q{q}", f"i{i}"),
            group=str(number),
        )

    cases = [(n, row, q, i) for n, row in enumerate(rows) for q in (0, 1) for i in (0, 1)]
    questions = each(cases, root, make)
    return Benchmark(
        "naturalbench", folder.source, questions, grade_naturalbench, score_naturalbench
    )


def grade_naturalbench(question: Question, text: str) -> float:
    return float(first_word(text, NATURAL_WORDS[question.kind]) == question.reference)


def score_naturalbench(questions: Sequence[Question], predictions: Sequence[str]) -> list[Score]:
    """One line of group, question, image and plain accuracy."""
    pairs = list(zip(questions, predictions, strict=True))
    rights = [grade_naturalbench(question, text) for question, text in pairs]
    yes = [first_word(text, NATURAL_WORDS[q.kind]) == "Yes" for q, text in pairs]
    parts = {
        "group": lambda q: q.group,
        "question": lambda q: q.label[0],
        "image": lambda q: q.label[1],
        "accuracy": lambda q: q.id,
    }
    return [score_sets("overall", questions, rights, parts, yes)]


def load_mmvp(root: Path) -> Benchmark:
    """MMVP (https://arxiv.org/abs/2401.06209): pairs of pictures that CLIP hardly tells apart.

    `pairs`, the published score, counts a pair if both answers are right. The letter is read by
    rule; the authors let people or GPT-4 judge.
    """
    folder = Folder(root, "https://huggingface.co/datasets/MMVP/MMVP")
    rows = folder.csv("Questions.csv")

    def make(pair) -> Question:
        number, row = pair
        options = [text.strip() for text in re.split(r"\([a-z]\)", row["Options"]) if text.strip()]
        letter = row["Correct Answer"].strip().strip("()").upper()
        if letter not in ("A", "B") or len(options) != 2:
            raise LlavaError(f"no two options with an answer: {row['Options']!r}")
        return ask(
            number,
            f"{with_options(row['Question'], options)}\n{LETTER}",
            str(root / "MMVP Images" / f"{number}.jpg"),
            reference=f"{letter}. {options['AB'.index(letter)]}",
            label=letter,
            group=f"pair {(number + 1) // 2}",
        )

    questions = each(list(enumerate(rows, start=1)), root / "Questions.csv", make)
    return Benchmark("mmvp", folder.source, questions, grade_mmvp, score_mmvp)


# From the strictest to the loosest form in which an answer may give its letter.
_MMVP_FORMS = (
    r"^\(?([AB])\)?\.?$",
    r"^\(?([AB])\)?[.\s]",
    r"answer\s+is\s+\(?([AB])\)?",
    r"option\s+\(?([AB])\)?",
    r"\(?([AB])\)?(?:\s|$)",
    r"^([AB])",
)


def mmvp_answer(text: str) -> str:
    """A or B in lmms-eval's reading, or an empty text; case is ignored."""
    text = text.strip()
    matches = (re.search(form, text, re.IGNORECASE) for form in _MMVP_FORMS)
    return next((match[1].upper() for match in matches if match), "")


def grade_mmvp(question: Question, text: str) -> float:
    return float(mmvp_answer(text) == question.label)


def score_mmvp(questions: Sequence[Question], predictions: Sequence[str]) -> list[Score]:
    """One line: share of pairs with both answers right, and of right answers."""
    rights = [grade_mmvp(q, text) for q, text in zip(questions, predictions, strict=True)]
    parts = {"pairs": lambda q: q.group, "accuracy": lambda q: q.id}
    return [score_sets("overall", questions, rights, parts, [])]
