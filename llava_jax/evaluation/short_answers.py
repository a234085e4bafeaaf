"""VQAv2, GQA, VizWiz and TextVQA: questions answered in a word or a phrase."""

from collections.abc import Sequence
from pathlib import Path

from llava_jax.errors import LlavaError
from llava_jax.evaluation.answer_accuracy import m4c_accuracy, normalize_answer, vqa_accuracy
from llava_jax.evaluation.benchmark import Benchmark, Question, ask, graded
from llava_jax.evaluation.files import Folder, each
from llava_jax.files import json_line, whole_file

SHORT = "Answer the question using a single word or phrase."
UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."


def load_vqav2(root: Path, split: str) -> Benchmark:
    """VQAv2 (https://visualqa.org): `test-dev2015`, whose labels are hidden, or `val2014`.

    The server wants an answer to every question of test2015, so the submission has an empty one
    for each question that was not asked.
    """
    if split not in ("test-dev2015", "val2014"):
        raise LlavaError(f"unknown VQAv2 split {split!r}: choose test-dev2015 or val2014")
    folder = Folder(root, "https://visualqa.org/download.html")
    name = f"v2_OpenEnded_mscoco_{split}_questions.json"
    items = folder.json(name)["questions"]
    image_set = split.replace("-dev", "")
    labels = {}
    if split == "val2014":
        annotations = folder.json(f"v2_mscoco_{split}_annotations.json")["annotations"]
        labels = {item["question_id"]: item for item in annotations}

    def make(item) -> Question:
        label = labels.get(item["question_id"])
        answers = tuple(a["answer"] for a in label["answers"]) if label else ()
        picture = f"{image_set}/COCO_{image_set}_{item['image_id']:012d}.jpg"
        return ask(
            item["question_id"],
            f"{item['question']}\n{SHORT}",
            str(root / picture),
            reference=summary(answers),
            kind=label["answer_type"] if label else "all",
            label=answers,
        )

    questions = each(items, root / name, make)
    if split == "val2014":
        # A submission is normalised before the server scores it; a local score has to do the same.
        metric = graded(lambda q, text: vqa_accuracy(normalize_answer(text), q.label))
        return Benchmark(f"vqav2/{split}", folder.source, questions, **metric)
    every = folder.json("v2_OpenEnded_mscoco_test2015_questions.json")["questions"]
    ids = [item["question_id"] for item in every]

    def submit(questions: Sequence[Question], predictions: Sequence[str], output: Path) -> Path:
        given = {int(q.id): text for q, text in zip(questions, predictions, strict=True)}
        answers = ((i, normalize_answer(given.get(i, ""))) for i in ids)
        rows = [{"question_id": i, "answer": answer} for i, answer in answers]
        return write_rows(output / "vqav2_submission.json", rows)

    return Benchmark(f"vqav2/{split}", folder.source, questions, submit=submit)


def load_gqa(root: Path) -> Benchmark:
    """GQA's balanced test-dev questions (https://cs.stanford.edu/people/dorarad/gqa).

    Exact match in lower case without full stops at the end. `submit` writes the file that the
    official eval.py reads.
    """
    folder = Folder(root, "https://cs.stanford.edu/people/dorarad/gqa/download.html")
    name = "testdev_balanced_questions.json"
    path = folder.path(name, f"questions1.2/{name}", f"data/{name}")
    items = folder.json(str(path.relative_to(root)))
    images = folder.path("images", "data/images", "allImages/images")

    def make(pair) -> Question:
        id, item = pair
        return ask(
            id,
            f"{item['question']}\n{SHORT}",
            str(images / f"{item['imageId']}.jpg"),
            reference=item["answer"],
            kind="open" if item["types"]["structural"] == "query" else "binary",
            label=item["answer"],
        )

    def submit(questions: Sequence[Question], predictions: Sequence[str], output: Path) -> Path:
        pairs = zip(questions, predictions, strict=True)
        rows = [{"questionId": q.id, "prediction": gqa_answer(text)} for q, text in pairs]
        return write_rows(output / "testdev_balanced_predictions.json", rows)

    questions = each(list(items.items()), path, make)
    metric = graded(lambda q, text: float(gqa_answer(text) == q.label))
    return Benchmark("gqa", folder.source, questions, submit=submit, **metric)


def gqa_answer(text: str) -> str:
    """A prediction in the form in which LLaVA passes it to GQA's scorer."""
    return text.rstrip(".").lower()


def load_vizwiz(root: Path) -> Benchmark:
    """VizWiz-VQA's test questions (https://vizwiz.org), whose labels are hidden."""
    folder = Folder(root, "https://vizwiz.org/tasks-and-datasets/vqa")
    items = folder.json("test.json", "Annotations/test.json")

    def make(item) -> Question:
        text = f"{item['question'].capitalize()}\n{UNANSWERABLE}\n{SHORT}"
        return ask(item["image"], text, str(root / "test" / item["image"]), label=item["image"])

    def submit(questions: Sequence[Question], predictions: Sequence[str], output: Path) -> Path:
        pairs = zip(questions, predictions, strict=True)
        rows = [{"image": q.label, "answer": normalize_answer(text)} for q, text in pairs]
        return write_rows(output / "vizwiz_submission.json", rows)

    questions = each(items, root / "test.json", make)
    return Benchmark("vizwiz", folder.source, questions, submit=submit)


def load_textvqa(root: Path) -> Benchmark:
    """TextVQA's validation questions (https://textvqa.org) with M4C's soft accuracy.

    As in LLaVA-1.5's evaluation, the prompt contains the words that Rosetta OCR read, and a
    question that is asked twice about a picture is scored both times with the later answers.
    """
    folder = Folder(root, "https://textvqa.org/dataset")
    name = "TextVQA_0.5.1_val.json"
    read = folder.json("TextVQA_Rosetta_OCR_v0.2_val.json")["data"]
    words = {item["image_id"]: item["ocr_tokens"] for item in read}
    items = folder.json(name)["data"]
    asked = lambda item: (item["image_id"], item["question"].lower())
    answers_to = {asked(item): item["answers"] for item in items}

    def make(item) -> Question:
        answers = answers_to[asked(item)]
        if len(answers) != 10:
            raise LlavaError(f"{len(answers)} answers, not ten")
        ocr = ", ".join(words[item["image_id"]])
        text = f"{item['question'].capitalize()}\nReference OCR token: {ocr}\n{SHORT}"
        return ask(
            item["question_id"],
            text,
            str(root / "train_images" / f"{item['image_id']}.jpg"),
            reference=summary(answers),
            label=tuple(answers),
        )

    questions = each(items, root / name, make)
    metric = graded(lambda q, text: m4c_accuracy(text, q.label))
    return Benchmark("textvqa", folder.source, questions, **metric)


def summary(answers: Sequence[str]) -> str:
    """Ten people's answers as one line: each answer once, the most frequent first."""
    return " / ".join(sorted(dict.fromkeys(answers), key=answers.count, reverse=True))


def write_rows(path: Path, rows: list[dict]) -> Path:
    """Writes a list of records as one line of JSON."""
    with whole_file(path) as file:
        file.write(json_line(rows))
    return path
