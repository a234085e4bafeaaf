"""ChartQA, DocVQA, InfographicVQA, OCRBench and MathVista: text, charts and figures in pictures.

Prompts and metrics are those of lmms-eval, with which LLaVA-OneVision was measured. The files are
the Parquet sets of the Hugging Face hub, with the pictures inside.
"""

from collections.abc import Sequence
from pathlib import Path

from llava_jax.errors import LlavaError
from llava_jax.evaluation.benchmark import Benchmark, Question, Score, ask, graded, score_by_kind
from llava_jax.evaluation.exams import HUB
from llava_jax.evaluation.files import Folder, each
from llava_jax.evaluation.short_answers import SHORT, write_rows
from llava_jax.files import write_json

SINGLE_WORD = "Answer the question with a single word."


def load_chartqa(root: Path) -> Benchmark:
    """ChartQA's test questions (https://arxiv.org/abs/2203.10244) with relaxed accuracy.

    Half of them were written by people, half generated (`augmented`).
    """
    folder = Folder(root, f"{HUB}/lmms-lab/ChartQA")
    rows = folder.parquet("test-*.parquet", "type", "question", "answer")

    def make(pair) -> Question:
        number, row = pair
        return ask(
            number,
            f"{row['question']}\n{SINGLE_WORD}",
            row.picture("image"),
            reference=row["answer"],
            kind="human" if row["type"] == "human_test" else "augmented",
        )

    questions = each(list(enumerate(rows)), root, make)
    grade = lambda q, text: float(is_nearly(text, q.reference))
    return Benchmark("chartqa", folder.source, questions, **graded(grade, "relaxed accuracy"))


def is_nearly(text: str, reference: str) -> bool:
    """Whether two numbers differ by at most 5% of the second; texts must be equal but for case.

    "12%" is 0.12. A reference of 0 is compared as text.
    """
    value, wanted = _number(text), _number(reference)
    if value is None or not wanted:
        return text.lower() == reference.lower()
    return abs(value - wanted) / abs(wanted) <= 0.05


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def load_docvqa(root: Path, split: str) -> Benchmark:
    """DocVQA (https://arxiv.org/abs/2007.00398): `validation`, or `test` with hidden answers."""
    return _documents("docvqa", root, split, f"{HUB}/lmms-lab/DocVQA (DocVQA)", "DocVQA")


def load_infovqa(root: Path, split: str) -> Benchmark:
    """InfographicVQA (https://arxiv.org/abs/2104.12756): `validation`, or the hidden `test`."""
    source = f"{HUB}/lmms-lab/DocVQA (InfographicVQA)"
    return _documents("infovqa", root, split, source, "InfographicVQA")


def _documents(name: str, root: Path, split: str, source: str, inside: str) -> Benchmark:
    """A set scored by ANLS; of the test split only the file for the server."""
    if split not in ("validation", "test"):
        raise LlavaError(f"unknown split {split!r}: choose validation or test")
    folder = Folder(root, source)
    columns = ("questionId", "question", "answers", "docId", "image_url")
    rows = folder.parquet(f"{split}-*.parquet", *columns, folders=("", "data", inside))

    def make(row) -> Question:
        answers = tuple(row["answers"] or ()) if split == "validation" else ()
        if split == "validation" and not answers:
            raise LlavaError("it has no answers")
        return ask(
            int(row["questionId"]),
            f"{row['question']}\n{SHORT}",
            row.picture("image"),
            reference=" / ".join(answers),
            label=answers,
            group=str(row.get("docId") or row.get("image_url") or ""),  # same picture in many rows
        )

    def submit(questions: Sequence[Question], predictions: Sequence[str], output: Path) -> Path:
        pairs = zip(questions, predictions, strict=True)
        answers = [{"questionId": int(q.id), "answer": text} for q, text in pairs]
        return write_rows(output / f"{name}_{split}_submission.json", answers)

    questions = each(rows, root, make)
    if split == "test":
        return Benchmark(f"{name}/test", folder.source, questions, submit=submit)
    metric = graded(lambda q, text: anls(text, q.label), "ANLS")
    return Benchmark(f"{name}/validation", folder.source, questions, **metric)


def anls(text: str, answers: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity: 1 - edits / length for the best answer.

    A similarity under 1/2 is 0. Edits are counted in lower case with single spaces, but the length
    is that of the longer text as it was written, as in lmms-eval.
    """
    tidy = lambda words: " ".join(words.strip().lower().split())
    distances = []
    for answer in answers:
        longest = max(len(answer), len(text))
        distances.append(edits(tidy(answer), tidy(text)) / longest if longest else 0.0)
    similarity = 1 - min(distances)
    return similarity if similarity >= 0.5 else 0.0


def edits(a: str, b: str) -> int:
    """Levenshtein distance: insertions, deletions and substitutions from one text to the other."""
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (letter != other))
    return row[-1]


def load_ocrbench(root: Path) -> Benchmark:
    """OCRBench (https://arxiv.org/abs/2305.07895): 1,000 questions of ten types, in points."""
    folder = Folder(root, f"{HUB}/echo840/OCRBench")
    columns = ("dataset", "question", "question_type", "answer")
    rows = folder.parquet("test-*.parquet", *columns)

    def make(pair) -> Question:
        number, row = pair
        answers = row["answer"]
        answers = (answers,) if isinstance(answers, str) else tuple(answers)
        return ask(
            number,
            row["question"].strip(),
            row.picture("image"),
            reference=" / ".join(answers),
            kind=row["question_type"],
            label=(answers, row["dataset"] == "HME100k"),
        )

    questions = each(list(enumerate(rows)), root, make)
    return Benchmark("ocrbench", folder.source, questions, grade_ocrbench, score_ocrbench)


def grade_ocrbench(question: Question, text: str) -> float:
    """1 if an answer is contained in the text; formulas are compared without spaces."""
    answers, is_formula = question.label
    tidy = _without_spaces if is_formula else _plain
    return float(any(tidy(answer) in tidy(text.strip()) for answer in answers))


def _without_spaces(text: str) -> str:
    return text.strip().replace("\n", " ").replace(" ", "")


# Full-width letters, digits and marks, and the ideographic space, as ASCII.
_NARROW = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: 0x20}


def _plain(text: str) -> str:
    return text.translate(_NARROW).lower().strip().replace("\n", " ")


def score_ocrbench(questions: Sequence[Question], predictions: Sequence[str]) -> list[Score]:
    """A line per type, and all in points of 1,000."""
    pairs = zip(questions, predictions, strict=True)
    *types, line = score_by_kind(questions, [grade_ocrbench(q, text) for q, text in pairs])
    points = {"points": 10 * line.values["accuracy"]} | dict(line.values)
    errors = {"points": 10 * line.errors["accuracy"]} | dict(line.errors)
    return [*types, Score("overall", line.count, points, errors)]


def load_mathvista(root: Path, split: str) -> Benchmark:
    """MathVista (https://arxiv.org/abs/2310.02255): `testmini`, or `test` with hidden answers.

    Asked in lmms-eval's `format` form. A language model extracts the answers, so this only writes
    the file that the official evaluation reads.
    """
    if split not in ("testmini", "test"):
        raise LlavaError(f"unknown split {split!r}: choose testmini or test")
    folder = Folder(root, f"{HUB}/AI4Math/MathVista")
    columns = ("pid", "question", "image", "choices", "unit", "precision", "answer",
               "question_type", "answer_type", "metadata", "query")  # fmt: skip
    rows = folder.parquet(f"{split}-*.parquet", *columns)

    def make(row) -> Question:
        unit = f" (Unit: {row['unit']})" if row["unit"] else ""
        options = [f"{chr(65 + i)}. {text}" for i, text in enumerate(row["choices"] or ())]
        text = "\n".join([row["question"] + unit, *options, mathvista_hint(row)])
        return ask(
            row["pid"],
            text,
            row.picture("decoded_image"),
            reference=row["answer"] or "",
            label=dict(row.values),
        )

    def submit(questions: Sequence[Question], predictions: Sequence[str], output: Path) -> Path:
        pairs = zip(questions, predictions, strict=True)
        answers = {q.id: q.label | {"query": q.text, "response": text} for q, text in pairs}
        path = output / f"mathvista_{split}.json"
        write_json(path, answers)
        return path

    questions = each(rows, root, make)
    return Benchmark(f"mathvista/{split}", folder.source, questions, submit=submit)


def mathvista_hint(row) -> str:
    """The sentence that asks for the form of the answer."""
    if row["question_type"] == "multi_choice":
        return "Answer with the option's letter from the given choices directly."
    forms = {"integer": "a single integer number", "list": "a Python list"}
    if row["answer_type"] == "float":
        places = {1: "one decimal place", 2: "two decimal places"}.get(int(row["precision"]))
        if places is None:
            raise LlavaError(f"the precision {row['precision']} is neither 1 nor 2")
        return f"Answer the question using a single floating-point number with {places}."
    return f"Answer the question using {forms[row['answer_type']]}."
