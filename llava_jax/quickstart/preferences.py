"""Preference tuning on a laptop: right answers about easy-VQA's pictures preferred to wrong ones.

    python -m llava_jax.quickstart.preferences     (after `make quickstart`)

A model says yes too often about what is not in a picture. Of each picture here it gets a question
about something in it, one about something that is not, and one for a colour or a shape, each with
the right answer and a wrong one: as many of either kind, so that "no" alone wins nothing. The model
is scored before and after, on pictures of the test split.
"""

import argparse
import collections
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

from llava_jax.errors import LlavaError
from llava_jax.files import write_records
from llava_jax.quickstart import easy_vqa
from llava_jax.quickstart.commands import ROOT, python, train
from llava_jax.quickstart.easy_vqa import COLORS, SHAPES, Question, group_of, read_questions
from llava_jax.quickstart.folders import is_written, written_folder
from llava_jax.weights.run_directory import latest_step

SOURCES = [__file__, easy_vqa.__file__]
PICTURES = 800  # to train on
GROUPS = ("absent", "present", "name")


def prepare_preferences(root: str | Path, log: Callable[[str], None] = print) -> Path:
    """Writes the data set to root/preferences, unless it is there, complete and unchanged.

    Files, whose image paths start at root/easy_vqa/images:
      train.json: three pairs about each of some training pictures, see the top of this module.
      val.json: the same of the pictures that stage 2 holds out.
    """
    root = Path(root)
    out_dir = root / "preferences"
    if is_written(out_dir, SOURCES, log):
        return out_dir
    held_out = json.loads((root / "easy_vqa/val_instruct.json").read_text(encoding="utf-8"))
    held_out = {record["image"] for record in held_out}
    asked = collections.defaultdict(lambda: {group: [] for group in GROUPS})
    for question in read_questions("train"):
        asked[f"train/{question.image}.png"][group_of(question)].append(question)
    usable = {file for file, groups in asked.items() if all(groups.values())}
    rng = random.Random("preferences")
    others = rng.sample(sorted(usable - held_out), PICTURES)
    with written_folder(out_dir, SOURCES) as temporary:
        for name, pictures in (("train", others), ("val", sorted(usable & held_out))):
            records = [pair for file in pictures for pair in _pairs(rng, file, asked[file])]
            write_records(temporary / f"{name}.json", records)
            log(f"preferences: {len(records):,} {name} pairs")
    return out_dir


def _pairs(rng: random.Random, file: str, groups: dict[str, list[Question]]) -> list[dict]:
    """A pair of each group of questions about a picture."""
    drawn = {group: rng.choice(questions) for group, questions in groups.items()}
    return [
        {
            "id": f"{Path(file).stem}-{group}",
            "image": file,
            "prompt": f"<image>\n{question.text}",
            "chosen": question.answer,
            "rejected": wrong_answer(rng, question.answer),
        }
        for group, question in drawn.items()
    ]


def wrong_answer(rng: random.Random, answer: str) -> str:
    """Another answer of the same kind."""
    kinds = (("yes", "no"), COLORS, SHAPES)
    kind = next(kind for kind in kinds if answer in kind)
    return rng.choice([other for other in kind if other != answer])


def main() -> None:
    argparse.ArgumentParser(
        prog="llava_jax.quickstart.preferences", description=__doc__.splitlines()[0]
    ).parse_args()
    try:
        if not latest_step(ROOT / "instruct"):
            raise LlavaError(f"{ROOT}/instruct has no checkpoint: run `make quickstart` first")
        prepare_preferences(ROOT)
        train("easy_vqa_dpo")
        for run in ("instruct", "preferences"):
            python(
                "eval.py",
                "--config=configs/eval/easy_vqa.py",
                "--config.options.split=test_1000",
                f"--checkpoint={ROOT / run}",
            )
    except LlavaError as error:
        sys.exit(f"quickstart: {error}")


if __name__ == "__main__":
    main()
