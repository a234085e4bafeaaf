"""`llava-jax explain`: where on a picture a model looked for its answer, as a picture."""

import argparse

import numpy as np

from llava_jax.errors import LlavaError
from llava_jax.inference.explain import (
    FEWEST_WINDOWS,
    MOST_WINDOWS,
    WINDOWS,
    format_of,
    peak,
)
from llava_jax.serving.command_line import add_model_arguments, load_from_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add = parser.add_argument
    add("--image", action="append", required=True, metavar="FILE",
        help="the picture; of several the last is explained")  # fmt: skip
    add("--prompt", required=True, metavar="TEXT", help="the question")
    add("--answer", metavar="TEXT", help="the answer to explain; default: the model's own")
    add("--system", metavar="TEXT", help="system prompt; default: the template's own")
    add("--out", required=True, metavar="FILE", help="picture to write, such as where.png")
    add("--windows", type=int, default=WINDOWS, metavar="N",
        help="along a side of the picture, which are blanked in turn")  # fmt: skip


def main(args: argparse.Namespace) -> int:
    """Writes the picture and prints the answer with both maps' peaks; returns the exit code."""
    # What is wrong is reported before the model is loaded.
    if not FEWEST_WINDOWS <= args.windows <= MOST_WINDOWS:
        fewest, most = FEWEST_WINDOWS, MOST_WINDOWS
        raise LlavaError(f"--windows must be from {fewest} to {most}, not {args.windows}")
    format_of(args.out)
    model = load_from_arguments(args)
    options = {"system": args.system, "windows": args.windows}
    found = model.explain(args.prompt, args.image, args.answer, **options)
    found.save(args.out)
    print(f"{found.answer}\nprobability of these {len(found.tokens)} tokens: "
          f"{np.exp(found.logprobs.sum()):.3g}")  # fmt: skip
    drop, attention = found.drop(), found.attention()
    print(f"blanking costs most at {_place(drop)}: {drop.max():.3g} nats")
    print(
        f"attention is largest at {_place(attention)}: the picture has {attention.sum():.1%} of it"
    )
    print(f"wrote {args.out}")
    return 0


def _place(values: np.ndarray) -> str:
    x, y = peak(values)
    return f"x {x:.0f}, y {y:.0f}"
