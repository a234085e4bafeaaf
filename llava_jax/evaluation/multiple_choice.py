"""ScienceQA, MMBench and SEED-Bench: questions answered with the letter of an option."""

import base64
import binascii
import re
import string
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from llava_jax.errors import LlavaError
from llava_jax.evaluation.benchmark import Benchmark, Question, Score, ask, graded, mean_score
from llava_jax.evaluation.files import Folder, each
from llava_jax.evaluation.statistics import percent, standard_error
from llava_jax.evaluation.xlsx import write_xlsx
from llava_jax.files import json_line, whole_file

LETTER = "Answer with the option's letter from the given choices directly."
LETTER_CN = "请直接回答选项字母。"
LETTERS = "ABCDE"  # of ScienceQA's options
ALPHABET = string.ascii_uppercase
# The cells that pandas, and so the original, reads as empty; also "nan" and "none" in any case.
EMPTY = {"", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "1.#IND", "1.#QNAN", "<NA>", "N/A",
         "NA", "NULL", "n/a", "null", "-NaN", "-nan"}  # fmt: skip
ROTATION = (
    1_000_000  # the index of a rotated MMBench question is that of the first plus k times this
)


def with_options(question: str, options: Sequence[str]) -> str:
    """("Which?", ["a", "b"]) -> "Which?\\nA. a\\nB. b"."""
    lines = (f"{letter}. {option}" for letter, option in zip(ALPHABET, options, strict=False))
    return "\n".join([question, *lines])


def load_scienceqa(root: Path) -> Benchmark:
    """ScienceQA's test questions (https://scienceqa.github.io), with and without a picture.

    LLaVA-1.5 reports `IMG`, those with a picture.
    """
    folder = Folder(root, "https://github.com/lupantech/ScienceQA (data/scienceqa)")
    problems = folder.json("problems.json")
    ids = folder.json("pid_splits.json")["test"]

    def make(id) -> Question:
        problem = problems[id]
        picture = problem["image"]
        context = f"Context: {problem['hint']}\n" if problem["hint"] else ""
        text = with_options(context + problem["question"], problem["choices"]).strip()
        letter = LETTERS[problem["answer"]]
        return ask(
            id,
            f"{text}\n{LETTER}",
            str(root / "images" / "test" / id / picture) if picture else None,
            reference=f"{letter}. {problem['choices'][problem['answer']]}",
            kind="IMG" if picture else "text",
            label=(letter, len(problem["choices"])),
        )

    questions = each(ids, root / "pid_splits.json", make)
    return Benchmark("scienceqa", folder.source, questions, grade_scienceqa, score_scienceqa)


def scienceqa_answer(text: str) -> str:
    """The letter that LLaVA's scorer finds in an answer, or an empty text.

    It accepts the bare letter, a letter with a full stop and a space at the start, or a single
    "The answer is X" followed by any character.
    """
    if text and text in LETTERS and len(text) == 1:
        return text
    if text[:1] in LETTERS and text[1:3] == ". ":
        return text[:1]
    found = re.findall(r"The answer is ([A-Z]).", text)
    return found[0] if len(found) == 1 else ""


def grade_scienceqa(question: Question, text: str) -> float:
    letter, options = question.label
    answer = scienceqa_answer(text)
    return float(answer == letter and answer in LETTERS[:options])


def score_scienceqa(questions: Sequence[Question], predictions: Sequence[str]) -> list[Score]:
    """Lines: questions without a picture, all, those with a picture."""
    lines = {line.kind: line for line in graded(grade_scienceqa)["score"](questions, predictions)}
    return [lines[kind] for kind in ("text", "overall", "IMG") if kind in lines]


def load_mmbench(root: Path, file: str, language: str) -> Benchmark:
    """MMBench (https://arxiv.org/abs/2307.06281), a .tsv with its pictures inside.

    Args:
      file: such as mmbench_dev_20230712.tsv or the Chinese mmbench_dev_cn_20231003.tsv.
      language: en or cn, the language of the sentence that asks for a letter.

    `circular`, the server's score, counts a question only if it is right with its options in every
    order. Answers are read by rule: a letter, or the text of one option. If the rules find nothing
    the answer is wrong here, whereas the server asks a language model. `submit` writes the
    server's .xlsx.
    """
    if language not in ("en", "cn"):
        raise LlavaError(f"unknown MMBench language {language!r}: choose en or cn")
    folder = Folder(
        root, f"https://download.openmmlab.com/mmclassification/datasets/mmbench/{file}"
    )
    rows = folder.csv(file, delimiter="\t")
    pictures = {row.get("index"): row.get("image") for row in rows}
    suffix = LETTER if language == "en" else LETTER_CN

    def make(row) -> Question:
        hint = "" if is_empty(row["hint"]) else row["hint"] + "\n"
        text = with_options(hint + row["question"], mmbench_options(row))
        options = {letter: row[letter] for letter in "ABCD" if not is_empty(row[letter])}
        answer = row.get("answer") or ""
        return ask(
            int(row["index"]),
            f"{text}\n{suffix}",
            # In later releases a rotated copy gives the index of the row that has the picture.
            decode_image(pictures.get(row["image"], row["image"])),
            image_name=f"{file}, row {row['index']}",
            reference=f"{answer}. {row[answer]}" if answer else "",
            kind=row.get("l2-category") or row.get("category") or "all",
            label=(answer, options),
        )

    questions = each(rows, root / file, make)
    columns = [c for c in rows[0] if c not in
               ("hint", "category", "source", "image", "comment", "l2-category")]  # fmt: skip
    cells = {str(int(row["index"])): [row[column] for column in columns] for row in rows}

    def submit(questions: Sequence[Question], predictions: Sequence[str], output: Path) -> Path:
        lines = [[*columns[:6], "prediction", *columns[6:]]]
        for q, text in zip(questions, predictions, strict=True):
            row = ["" if is_empty(cell) else cell for cell in cells[q.id]]
            lines.append([int(q.id), *row[1:6], text, *row[6:]])
        return write_xlsx(output / f"{Path(file).stem}.xlsx", lines)

    metric = {"grade": grade_mmbench, "score": score_mmbench} if questions[0].label[0] else {}
    name = f"mmbench/{Path(file).stem}"
    return Benchmark(name, folder.source, questions, submit=submit, **metric)


def is_empty(cell: str | None) -> bool:
    return cell is None or cell in EMPTY or cell.lower() in ("nan", "none")


def mmbench_options(row: Mapping[str, str]) -> list[str]:
    """Options A to D up to the first empty one; any that follow it are not shown."""
    options = []
    for letter in "ABCD":
        if is_empty(row[letter]):
            break
        options.append(row[letter])
    return options


def decode_image(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise LlavaError(f"its picture is not base64: {error}") from None


def mmbench_answer(text: str, options: Mapping[str, str]) -> str:
    """The letter that MMBench's rules read in an answer, or an empty text.

    Either the letter of one option as a word among the last four, or the text of one option, in an
    answer at most twice as long as all options together. Z means that no option fits.
    """
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", text).split()
    letters = [letter for letter in options if letter in words]
    if len(letters) == 1 and words.index(letters[0]) > len(words) - 5:
        return letters[0]
    refused = not letters and "Z" in words
    if refused or len(text) > 2 * sum(map(len, options.values())):
        return ""
    named = [letter for letter, option in options.items() if option.lower() in text.lower()]
    return named[0] if len(named) == 1 else ""


def grade_mmbench(question: Question, text: str) -> float:
    answer, options = question.label
    return float(mmbench_answer(text, options) == answer)


def score_mmbench(questions: Sequence[Question], predictions: Sequence[str]) -> list[Score]:
    """Circular accuracy by category, plain accuracy, circular accuracy."""
    rounds, kinds = defaultdict(list), {}
    for question, text in zip(questions, predictions, strict=True):
        base = int(question.id) % ROTATION
        rounds[base].append((int(question.id), grade_mmbench(question, text)))
        kinds.setdefault(base, question.kind)
    plain = [min(answers)[1] for answers in rounds.values()]
    circular = {base: float(all(grade for _, grade in rounds[base])) for base in rounds}
    groups = defaultdict(list)
    for base, right in circular.items():
        groups[kinds[base]].append(right)
    lines = [*sorted(groups.items()), ("plain", plain), ("circular", list(circular.values()))]
    return [_line(kind, grades) for kind, grades in lines]


def _line(kind: str, grades: Sequence[float]) -> Score:
    """A line over grades that are independent of each other."""
    error = standard_error(grades, range(len(grades)))
    return Score(kind, len(grades), {"accuracy": percent(grades)}, {"accuracy": error})


def load_seed(root: Path) -> Benchmark:
    """SEED-Bench (https://arxiv.org/abs/2307.16125): pictures, and the middle frames of videos.

    Only the bare letter counts, as in LLaVA-1.5's evaluation. `submit` writes the leaderboard's
    file.
    """
    folder = Folder(root, "https://github.com/AILab-CVC/SEED-Bench (DATASET.md)")
    data = folder.json("SEED-Bench.json")
    names = {number: name for name, number in data["question_type"].items()}

    def make(item) -> Question:
        options = [item[f"choice_{letter}"] for letter in "abcd"]
        type_id, id = item["question_type_id"], item["question_id"]
        frame = root / "SEED-Bench-video-image" / f"{type_id}_{id}.png"
        picture = root / "SEED-Bench-image" / item["data_id"]
        answer = item["answer"]
        return ask(
            id,
            f"{with_options(item['question'], options)}\n{LETTER}",
            str(picture if item["data_type"] == "image" else frame),
            reference=f"{answer}. {options[LETTERS.index(answer)]}",
            kind=names[type_id],
            label=(answer, item["data_type"]),
        )

    def submit(questions: Sequence[Question], predictions: Sequence[str], output: Path) -> Path:
        path = output / "seed_submission.jsonl"
        pairs = zip(questions, predictions, strict=True)
        with whole_file(path) as file:
            file.writelines(json_line({"question_id": q.id, "prediction": t}) for q, t in pairs)
        return path

    questions = each(data["questions"], root / "SEED-Bench.json", make)
    source = f"{folder.source}; frames of videos are SEED-Bench-video-image/TYPE_ID.png"
    return Benchmark("seed", source, questions, grade_seed, score_seed, submit)


def grade_seed(question: Question, text: str) -> float:
    return float(text == question.label[0])


def score_seed(questions: Sequence[Question], predictions: Sequence[str]) -> list[Score]:
    """A line per type of question, then pictures, videos, overall."""
    *types, overall = graded(grade_seed)["score"](questions, predictions)
    media = defaultdict(list)
    for question, text in zip(questions, predictions, strict=True):
        media[question.label[1]].append((question, grade_seed(question, text)))
    lines = [mean_score(kind, *zip(*pairs, strict=True)) for kind, pairs in media.items()]
    return [*types, *lines, overall]
