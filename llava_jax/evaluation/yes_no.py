"""POPE and MME: questions answered with yes or no."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from llava_jax.errors import LlavaError
from llava_jax.evaluation.benchmark import Benchmark, Question, Score, ask, percent
from llava_jax.evaluation.files import Folder, questions_of, readable
from llava_jax.evaluation.short_answers import SHORT

POPE_SPLITS = ("adversarial", "popular", "random")
PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene",
              "landmark", "artwork", "OCR")  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation",
             "code_reasoning")  # fmt: skip


def load_pope(root: Path) -> Benchmark:
    """POPE on COCO (https://arxiv.org/abs/2305.10355): does the model see what is not there?

    Scores by split: F1, accuracy, precision and recall of "yes", and how often it says yes (half
    of the right answers are). `mean` is the mean of the three F1, which LLaVA-1.5 reports.
    """
    # The version LLaVA-1.5 was measured with: 2,910 questions in `random`, not 3,000.
    commit = "e3e39262c85a6a83f26cf5094022a782cb0df58d"
    folder = Folder(root, f"https://github.com/AoiDragon/POPE/tree/{commit}/output/coco")
    questions = []
    for split in POPE_SPLITS:
        name = f"coco_pope_{split}.json"
        path = folder.path(f"coco/{name}", name)

        def make(item, split=split) -> Question:
            if item["label"] not in ("yes", "no"):
                raise LlavaError(f"the label {item['label']!r} is neither yes nor no")
            return ask(
                f"{split}/{item['question_id']}",
                f"{item['text']}\n{SHORT}",
                str(root / "val2014" / item["image"]),
                reference=item["label"],
                kind=split,
            )

        questions += questions_of(folder.json_lines(str(path.relative_to(root))), path, make)
    source = f"{folder.source} (pictures: https://cocodataset.org, val2014)"
    return Benchmark("pope", source, questions, grade_pope, score_pope)


def pope_answer(text: str) -> str:
    """`no` if the first sentence has the word No, no or not, else `yes`: POPE's own reading."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def grade_pope(question: Question, text: str) -> float:
    return float(pope_answer(text) == question.reference)


def score_pope(questions: Sequence[Question], predictions: Sequence[str]) -> list[Score]:
    """Lines by split, and their mean."""
    groups = defaultdict(list)
    for question, text in zip(questions, predictions, strict=True):
        groups[question.kind].append((pope_answer(text) == "yes", question.reference == "yes"))
    scores = [Score(split, len(pairs), yes_metrics(pairs)) for split, pairs in groups.items()]
    mean = {
        name: sum(score.values[name] for score in scores) / len(scores) for name in scores[0].values
    }
    return [*scores, Score("mean", len(questions), mean)]


def yes_metrics(pairs: Sequence[tuple[bool, bool]]) -> dict[str, float]:
    """Percentages of (said yes, is yes) pairs; what would divide by zero is 0."""
    said, true = sum(s for s, _ in pairs), sum(t for _, t in pairs)
    both = sum(s and t for s, t in pairs)
    return {
        "F1": 200 * both / (said + true) if both else 0.0,
        "accuracy": percent([s == t for s, t in pairs]),
        "precision": 100 * both / said if said else 0.0,
        "recall": 100 * both / true if true else 0.0,
        "yes": 100 * said / len(pairs),
    }


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
        if not files:  # its points would lack in the sum
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
        # LLaVA-1.5 asks for a short answer in the words it was trained with.
        text = question.replace("Please answer yes or no.", "").strip()
        return ask(
            f"{category}/{image.name}/{lines.index(line)}",
            f"{text}\n{SHORT}",
            str(image),
            reference=answer.lower(),
            kind=category,
            label=f"{category}/{image.name}",
        )

    return questions_of(lines, file, make)


def mme_answer(text: str) -> str:
    """yes, no or other: what MME's own scorer finds in the first four letters."""
    start = text.lower()[:4]
    return next((word for word in ("yes", "no") if word in start), "other")


def grade_mme(question: Question, text: str) -> float:
    return float(mme_answer(text) == question.reference)


def score_mme(questions: Sequence[Question], predictions: Sequence[str]) -> list[Score]:
    """Points by category, of cognition and of perception."""
    groups = defaultdict(lambda: defaultdict(list))
    for question, text in zip(questions, predictions, strict=True):
        groups[question.kind][question.label].append(grade_mme(question, text))
    scores = {}
    for category, images in groups.items():
        grades = [grade for pair in images.values() for grade in pair]
        plus = percent([float(all(pair)) for pair in images.values()])
        accuracy = percent(grades)
        values = {"points": accuracy + plus, "accuracy": accuracy, "accuracy+": plus}
        scores[category] = Score(category, len(grades), values)
    lines = list(scores.values())
    for name, members in (("cognition", COGNITION), ("perception", PERCEPTION)):
        parts = [scores[category] for category in members if category in scores]
        if parts:
            points = sum(part.values["points"] for part in parts)
            lines.append(Score(name, sum(part.count for part in parts), {"points": points}))
    return lines
