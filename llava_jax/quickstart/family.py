"""What the rest of the LLaVA family adds, learnt on a laptop: tiles, several pictures, videos.

    python -m llava_jax.quickstart.family     (`make quickstart-family`, after `make quickstart`)

Three short recipes continue from the quickstart's model on pictures composed of easy-VQA's. Each
is scored next to the blind baseline, which never sees a picture, and to its ablation, which lacks
what the recipe is about. Stopped at any time, the same command continues.
"""

import argparse
import json
import sys
import time
from typing import NamedTuple

from llava_jax.errors import LlavaError
from llava_jax.evaluation.report import aligned
from llava_jax.quickstart.commands import ROOT, python, train
from llava_jax.quickstart.composed import prepare_composed
from llava_jax.weights.run_directory import latest_step


class Proof(NamedTuple):
    """One ability, and the data that needs it.

    Attributes:
      data: name of a data set of `composed`.
      recipe, ablated: of `configs/`; the same if the ablation is a matter of what is asked.
      run, ablated_run: their work directories below ROOT.
      split, ablated_split: what each is asked.
      ablation: what the ablation lacks, in words.
    """

    data: str
    recipe: str
    run: str
    split: str
    ablated: str
    ablated_run: str
    ablated_split: str
    ablation: str


PROOFS = (
    Proof(
        "poster", "easy_vqa_poster", "poster_tiles", "test",
        "easy_vqa_poster_one_view", "poster_one_view", "test", "one view, no tiles",
    ),
    Proof(
        "several", "easy_vqa_several", "several_pictures", "test",
        "easy_vqa_several", "several_pictures", "test_ablation", "pictures in another order",
    ),
    Proof(
        "video", "easy_vqa_video", "video_frames", "test",
        "easy_vqa_video_middle", "video_middle", "test_ablation", "the middle frame alone",
    ),
)  # fmt: skip


def main() -> None:
    argparse.ArgumentParser(
        prog="llava_jax.quickstart.family", description=__doc__.splitlines()[0]
    ).parse_args()
    try:
        family()
    except LlavaError as error:
        sys.exit(f"quickstart: {error}")


def family() -> None:
    """Data, training and scores of all proofs, and one table of the results."""
    if not latest_step(ROOT / "instruct"):
        raise LlavaError(f"{ROOT}/instruct has no checkpoint: run `make quickstart` first")
    rows = [("data", "n", "kind", "accuracy", "ablation", "blind", "the ablation")]
    for proof in PROOFS:
        began = time.monotonic()
        print(f"\n== {proof.data} ==", flush=True)
        prepare_composed(proof.data, ROOT / proof.data)
        for recipe in dict.fromkeys((proof.recipe, proof.ablated)):
            train(recipe)
        scores = evaluate(proof.data, proof.run, proof.split)
        ablated = evaluate(proof.data, proof.ablated_run, proof.ablated_split)
        for kind, score in scores.items():
            figures = (score["accuracy"], ablated[kind]["accuracy"], score["blind"])
            cells = (f"{value:.1f}" for value in figures)
            rows.append((proof.data, str(score["count"]), kind, *cells, proof.ablation))
        print(f"   {(time.monotonic() - began) / 60:.1f} min", flush=True)
    table = aligned(rows)
    (ROOT / "family.txt").write_text(table + "\n", encoding="utf-8")
    print(f"\n{table}\n\nWritten to {ROOT}/family.txt")


def evaluate(data: str, run: str, split: str) -> dict[str, dict]:
    """The scores of a run on a split, by kind of question: count, accuracy and blind score."""
    out = ROOT / run / "eval" / "easy_vqa" / split
    python(
        "eval.py",
        "--config=configs/eval/easy_vqa.py",
        f"--config.data_root={ROOT / data}",
        f"--config.options.split={split}",
        f"--checkpoint={ROOT / run}",
    )
    return json.loads((out / "metrics.json").read_text(encoding="utf-8"))["scores"]


if __name__ == "__main__":
    main()
