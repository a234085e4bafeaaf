"""easy-VQA as LLaVA records: captions for stage 1, conversations for stage 2, questions to test.

The package `easy-vqa` (MIT) holds 5,000 pictures of one coloured shape and 48,248 questions about
them; see https://github.com/vzhou842/easy-VQA.
"""

import collections
import hashlib
import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from llava_jax.data.build import build_data_set
from llava_jax.errors import LlavaError
from llava_jax.files import write_records
from llava_jax.quickstart.folders import is_written, written_folder
from llava_jax.quickstart.packages import package_file, package_folder

COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
KINDS = ("yes/no", "shape", "color")
CAPTION_PROMPT = "Provide a brief description of the given image."
VALIDATION_IMAGES = 40
FIXED_QUESTIONS = 1000


class Question(NamedTuple):
    """One line of the package's `questions.json`."""

    text: str
    answer: str
    image: int

    @property
    def kind(self) -> str:
        if self.answer in COLORS:
            return "color"
        return "shape" if self.answer in SHAPES else "yes/no"


def prepare_easy_vqa(out_dir: str | Path, log: Callable[[str], None] = print) -> Path:
    """Writes the data set to `out_dir`, unless it is there, complete and unchanged.

    Files, all with image paths relative to `images/`:
      align.json: picture and caption, for stage 1.
      instruct.json: picture and all its questions as one conversation, for stage 2.
      val_align.json, val_instruct.json: the same for 40 pictures that are in neither of them.
      test.json: every test question as a record of its own, with keys question, answer and kind.
      test_1000.json: a fixed 1,000 of them, with the same share of each kind.
      blind.json: the scores on both of a baseline that never sees the picture.
      tfds/easy_vqa_align, tfds/easy_vqa_instruct: the training records as TFDS ArrayRecord sets.

    Raises:
      LlavaError: the package is missing or is another version.
    """
    out_dir = Path(out_dir)
    if is_written(out_dir, [__file__], log):
        return out_dir
    log(f"easy-VQA: writing {out_dir} ...")
    train, test = read_questions("train"), read_questions("test")
    tests = test_records(test)
    fixed = fixed_part(tests)
    files = {
        **training_records(train),
        "test": tests,
        f"test_{FIXED_QUESTIONS}": fixed,
    }
    with written_folder(out_dir, [__file__]) as temporary:
        for name, records in files.items():
            write_records(temporary / f"{name}.json", records)
        blind = {
            "test": blind_scores(train, tests),
            f"test_{FIXED_QUESTIONS}": blind_scores(train, fixed),
        }
        (temporary / "blind.json").write_text(json.dumps(blind, indent=2) + "\n")
        for split in ("train", "test"):
            source = package_folder("easy_vqa", "easy-vqa") / "data" / split / "images"
            shutil.copytree(
                source, temporary / "images" / split, ignore=shutil.ignore_patterns(".*")
            )
        for name in ("align", "instruct"):
            build_data_set(
                temporary / f"{name}.json",
                temporary / "images",
                temporary / "tfds",
                f"easy_vqa_{name}",
                progress=False,
            )
    log("easy-VQA: " + ", ".join(f"{len(r):,} {name}" for name, r in files.items()) + " records")
    return out_dir


def read_questions(split: str) -> list[Question]:
    """All questions of `train` or `test`, in the package's order."""
    path = package_file("easy_vqa", "easy-vqa", f"data/{split}/questions.json")
    questions = [Question(*entry) for entry in json.loads(path.read_text())]
    known = {*COLORS, *SHAPES, "yes", "no"}
    if not questions or any(q.answer not in known for q in questions):
        raise LlavaError(f"{path} has answers that this recipe does not know: install easy-vqa 1.0")
    return questions


def training_records(questions: list[Question]) -> dict[str, list[dict]]:
    """The records of both stages; those named `val_` have pictures that the others do not have."""
    by_image = collections.defaultdict(list)
    for question in questions:
        by_image[question.image].append(question)
    held_out = set(sorted(by_image, key=lambda image: _digest(f"val {image}"))[:VALIDATION_IMAGES])
    records = {name: [] for name in ("align", "instruct", "val_align", "val_instruct")}
    for image, own in sorted(by_image.items()):
        common = {"id": f"train-{image}", "image": f"train/{image}.png"}
        turns = order_questions(own, f"order {image}")
        exchanges = [(q.text, q.answer) for q in turns]
        whole = common | {"conversations": conversation(exchanges)}
        prefix = "val_" if image in held_out else ""
        records[f"{prefix}instruct"].append(whole)
        if text := caption(own):
            records[f"{prefix}align"].append(
                common | {"conversations": conversation([(CAPTION_PROMPT, text)])}
            )
    return records


def order_questions(questions: list[Question], seed: str) -> list[Question]:
    """The questions of one picture in a fixed random order that teaches to look.

    Early answers give later ones away ("is there a blue shape? yes"), so the first turns matter
    most. Drawn evenly, three of four would be yes/no, and four of five of those would ask for
    something absent: a constant answer would be right. So the next question is equally likely to
    be about something present, to be about something absent, and to ask for a shape or colour.
    """
    rng = random.Random(seed)
    groups = {}
    for question in questions:
        groups.setdefault(group_of(question), []).append(question)
    for group in groups.values():
        rng.shuffle(group)
    ordered = []
    while left := sorted(name for name, group in groups.items() if group):
        ordered.append(groups[rng.choice(left)].pop())
    return ordered


def group_of(question: Question) -> str:
    """The group of a question: about a "present" or "absent" thing, or a shape or colour to "name".

    "is there not a red shape?" with the answer "no" is about something present.
    """
    if question.kind != "yes/no":
        return "name"
    negated = re.search(r"\b(not|no)\b", question.text) is not None
    return "present" if (question.answer == "yes") != negated else "absent"


def caption(questions: list[Question]) -> str | None:
    """The answers as a caption such as "a blue rectangle."; None if they leave a word open."""
    words = [_settled(questions, choices) for choices in (COLORS, SHAPES)]
    return f"a {words[0]} {words[1]}." if all(words) else None


def _settled(questions: list[Question], choices: tuple[str, ...]) -> str | None:
    """The one of `choices` that the answers state, or the only one that they do not exclude."""
    stated, excluded = set(), set()
    for question in questions:
        words = re.findall("[a-z]+", question.text)
        named = set(words) & set(choices)
        if question.kind == "yes/no":
            negated = "no" in words or "not" in words
            (stated if (question.answer == "yes") != negated else excluded).update(named)
        else:
            # "what color is the circle?" presupposes a circle.
            stated |= named | ({question.answer} & set(choices))
    possible = stated or set(choices) - excluded
    return possible.pop() if len(possible) == 1 else None


def test_records(questions: list[Question]) -> list[dict]:
    """One record for each question, with the keys that a scorer needs besides the conversation."""
    return [
        {
            "id": f"test-{index}",
            "image": f"test/{q.image}.png",
            "conversations": conversation([(q.text, q.answer)]),
            "question": q.text,
            "answer": q.answer,
            "kind": q.kind,
        }
        for index, q in enumerate(questions)
    ]


test_records.__test__ = False  # not a test, whatever pytest makes of the name


def fixed_part(records: list[dict]) -> list[dict]:
    """1,000 records in their order, chosen by a hash of their ids; shares of kinds are kept."""
    groups = [[r for r in records if r["kind"] == kind] for kind in KINDS]
    shares = [round(FIXED_QUESTIONS * len(group) / len(records)) for group in groups]
    shares[0] += FIXED_QUESTIONS - sum(shares)
    picked = set()
    for group, share in zip(groups, shares, strict=True):
        ids = sorted((r["id"] for r in group), key=_digest)
        picked.update(ids[:share])
    return [r for r in records if r["id"] in picked]


def blind_scores(train: list[Question], records: list[dict]) -> dict[str, dict]:
    """Scores by kind of the most common training answer to the same words, without any picture."""
    answers = collections.defaultdict(collections.Counter)
    for question in train:
        answers[question.text][question.answer] += 1
    kinds = sorted({record["kind"] for record in records})
    counts = {kind: [0, 0] for kind in ("overall", *kinds)}
    for record in records:
        known = answers.get(record["question"])
        right = known is not None and known.most_common(1)[0][0] == record["answer"]
        for kind in ("overall", record["kind"]):
            counts[kind][0] += right
            counts[kind][1] += 1
    return {
        kind: {"accuracy": round(right / total, 4), "correct": right, "total": total}
        for kind, (right, total) in counts.items()
        if total
    }


def conversation(exchanges: list[tuple[str, str]], pictures: int = 1) -> list[dict]:
    """The turns of (question, answer) pairs; the pictures stand before the first.

    Several are numbered: "picture 1: <image>", "picture 2: <image>", each on a line of its own.
    """
    shown = "<image>\n"
    if pictures != 1:
        shown = "".join(f"picture {i + 1}: <image>\n" for i in range(pictures))
    turns = []
    for i, (question, answer) in enumerate(exchanges):
        turns.append({"from": "human", "value": (shown if i == 0 else "") + question})
        turns.append({"from": "gpt", "value": answer})
    return turns


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
