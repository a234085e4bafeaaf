"""The pointing game: how often a map of where the model looked peaks on the shape.

python -m bench.pointing --checkpoint=FOLDER --data=runs/quickstart/easy_vqa/test.json

One question about the shape or its color for each picture, explained with the right answer. A map
points at the shape if its peak is inside the box of all pixels that are not the background
(https://arxiv.org/abs/1608.00507). `chance` is the share of the pictures that these boxes take:
what a point anywhere would hit.
"""

import random
from pathlib import Path

import numpy as np
from absl import flags
from PIL import Image

from llava_jax import command
from llava_jax.evaluation import easy_vqa
from llava_jax.evaluation.benchmark import Question
from llava_jax.inference.explain import WINDOWS, Explanation, peak
from llava_jax.inference.model import Llava
from llava_jax.quickstart.boxes import box_of

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "What Llava.from_pretrained takes.")
DATA = flags.DEFINE_string("data", None, "Records of easy-VQA, written by the quickstart.")
PICTURES = flags.DEFINE_integer("pictures", 100, "Drawn of the file's.")
WINDOWS_A_SIDE = flags.DEFINE_integer("windows", WINDOWS, "That are blanked, along a side.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Requests at once.")
DTYPE = flags.DEFINE_string("dtype", "float32", "Of computation.")

KINDS = ("shape", "color")


def main() -> None:
    data = Path(DATA.value)
    questions = chosen(easy_vqa.load(data.parent, data.stem).questions, PICTURES.value)
    model = Llava.from_pretrained(CHECKPOINT.value, dtype=DTYPE.value)
    hits = {kind: [] for kind in KINDS}
    for question in questions:
        picture = Image.open(question.images[0]).convert("RGB")
        found = model.explain(
            question.prompt, [picture], question.reference,
            windows=WINDOWS_A_SIDE.value, batch_size=BATCH_SIZE.value,
        )  # fmt: skip
        hits[question.kind].append(pointed(found))
    hits["all"] = [hit for kind in KINDS for hit in hits[kind]]
    print("| question | pictures | blanking | attention | chance |\n|---|--:|--:|--:|--:|")
    for kind, of_kind in hits.items():
        if of_kind:
            rates = (f"{100 * rate:.0f}%" for rate in np.mean(of_kind, axis=0))
            print(f"| {kind} | {len(of_kind)} | {' | '.join(rates)} |")


def chosen(questions: list[Question], count: int) -> list[Question]:
    """A question of KINDS for each of so many pictures, the same ones each time."""
    rng, by_picture = random.Random(0), {}
    for question in rng.sample(questions, len(questions)):
        if question.kind in KINDS:
            by_picture.setdefault(question.images[0], question)
    return list(by_picture.values())[:count]


def pointed(found: Explanation) -> tuple[bool, bool, float]:
    """Whether blanking and attention point at the shape, and how much of the picture its box is."""
    left, top, right, bottom = box_of(found.picture)

    def inside(values: np.ndarray) -> bool:
        x, y = peak(values)
        return left <= x <= right and top <= y <= bottom

    share = (right - left) * (bottom - top) / np.prod(found.picture.size)
    return inside(found.drop()), inside(found.attention()), share


if __name__ == "__main__":
    command.run(main, required=("checkpoint", "data"))
