"""A picture of what the trained model answers: pictures of the test split with their questions."""

import json
from pathlib import Path

import matplotlib
from PIL import Image

from llava_jax.errors import LlavaError
from llava_jax.quickstart.easy_vqa import KINDS, Question

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SHOWN = 6


def draw_answers(predictions: Path, image_root: Path, out: Path) -> list[dict]:
    """Draws the first answers of a test, right or wrong, each kind of question in turn.

    Args:
      predictions: `predictions.jsonl` of eval.py.
      image_root: folder that its picture paths are relative to.
      out: the PNG file to write.

    Returns:
      The lines of `predictions` that are drawn.
    """
    lines = [json.loads(line) for line in predictions.read_text(encoding="utf-8").splitlines()]
    chosen = choose(lines)
    if not chosen:
        raise LlavaError(f"{predictions} has no answers: run eval.py again")
    figure, axes = plt.subplots(
        1, len(chosen), figsize=(2 * len(chosen), 2.5), squeeze=False, constrained_layout=True
    )
    for axis, line in zip(axes[0], chosen, strict=True):
        with Image.open(image_root / line["image"]) as picture:
            axis.imshow(picture.convert("RGB"))
        right = line["grade"] == 1
        answer = line["prediction"] if right else f"{line['prediction']} (no: {line['reference']})"
        axis.set_title(wrapped(line["question"]), fontsize=10)
        axis.set_xlabel(answer, fontsize=12, color="#1a7f37" if right else "#cf222e")
        axis.set(xticks=(), yticks=())
    figure.savefig(out, dpi=100)
    plt.close(figure)
    return chosen


def choose(lines: list[dict]) -> list[dict]:
    """The first lines of a test about different pictures, each kind of question in turn."""
    waiting = {kind: [line for line in lines if kind_of(line) == kind] for kind in KINDS}
    chosen, seen = [], set()
    while len(chosen) < SHOWN and any(waiting.values()):
        for group in waiting.values():
            while group and group[0]["image"] in seen:
                group.pop(0)
            if group and len(chosen) < SHOWN:
                chosen.append(group.pop(0))
                seen.add(chosen[-1]["image"])
    return chosen


def kind_of(line: dict) -> str:
    return Question(line["question"], line["reference"], 0).kind


def wrapped(question: str) -> str:
    """A question in two lines of about the same length."""
    words = question.split()
    cut = min(
        range(1, len(words) + 1),
        key=lambda i: abs(len(" ".join(words[:i])) - len(" ".join(words[i:]))),
    )
    return "\n".join(filter(None, (" ".join(words[:cut]), " ".join(words[cut:]))))
