"""Benchmarks: the questions and the metric of each, and one runner for all.

`runner` has what asks a model; nothing else here needs JAX.
"""

from collections.abc import Callable
from pathlib import Path

from llava_jax.errors import LlavaError
from llava_jax.evaluation import (
    coco_captions,
    easy_vqa,
    multiple_choice,
    open_ended,
    refcoco,
    short_answers,
    yes_no,
)
from llava_jax.evaluation.benchmark import Benchmark, Shard
from llava_jax.evaluation.files import NOT_AS_EXPECTED, check_images
from llava_jax.evaluation.report import comparison, table, write_report

# name -> load(root, **options); a benchmark's config has its options under `options`.
BENCHMARKS: dict[str, Callable[..., Benchmark]] = {
    "easy_vqa": easy_vqa.load,
    "vqav2": short_answers.load_vqav2,
    "gqa": short_answers.load_gqa,
    "vizwiz": short_answers.load_vizwiz,
    "textvqa": short_answers.load_textvqa,
    "scienceqa": multiple_choice.load_scienceqa,
    "pope": yes_no.load_pope,
    "mme": yes_no.load_mme,
    "mmbench": multiple_choice.load_mmbench,
    "seed": multiple_choice.load_seed,
    "mmvet": open_ended.load_mmvet,
    "llava_bench": open_ended.load_llava_bench,
    "refcoco": refcoco.load,
    "coco_captions": coco_captions.load,
}


def load_benchmark(name: str, root: str, options: dict[str, str]) -> Benchmark:
    """The benchmark `name` over the published files below `root`."""
    if name not in BENCHMARKS:
        raise LlavaError(f"unknown benchmark {name!r}: choose one of {', '.join(BENCHMARKS)}")
    try:
        return BENCHMARKS[name](Path(root), **options)
    except LlavaError:
        raise
    except (OSError, *NOT_AS_EXPECTED) as error:
        raise LlavaError(
            f"{name}: the files below {root} are not as published ({type(error).__name__}: {error})"
        ) from error


__all__ = [
    "BENCHMARKS",
    "Shard",
    "check_images",
    "comparison",
    "load_benchmark",
    "table",
    "write_report",
]
