"""Benchmarks: the questions and the metric of each, and one runner for all.

Only `runner`, which asks a model, `confidence` and `lmms_adapter` need JAX.
"""

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from llava_jax.errors import LlavaError
from llava_jax.evaluation import (
    amber,
    chair,
    coco_captions,
    documents,
    easy_vqa,
    easy_vqa_boxes,
    exams,
    multiple_choice,
    open_ended,
    paired,
    refcoco,
    short_answers,
    videos,
    yes_no,
)
from llava_jax.evaluation.benchmark import Benchmark
from llava_jax.evaluation.files import NOT_AS_EXPECTED, MissingFile, check_images
from llava_jax.evaluation.report import table, write_report
from llava_jax.parallel.shares import Shard

# name -> load(root, **options); the options come from `config.options`.
BENCHMARKS: dict[str, Callable[..., Benchmark]] = {
    "easy_vqa": easy_vqa.load,
    "easy_vqa_boxes": easy_vqa_boxes.load,
    "vqav2": short_answers.load_vqav2,
    "gqa": short_answers.load_gqa,
    "vizwiz": short_answers.load_vizwiz,
    "textvqa": short_answers.load_textvqa,
    "scienceqa": multiple_choice.load_scienceqa,
    "pope": yes_no.load_pope,
    "repope": yes_no.load_repope,
    "amber": amber.load,
    "chair": chair.load,
    "hallusionbench": paired.load_hallusionbench,
    "naturalbench": paired.load_naturalbench,
    "mmvp": paired.load_mmvp,
    "mme": yes_no.load_mme,
    "mmbench": multiple_choice.load_mmbench,
    "seed": multiple_choice.load_seed,
    "mmvet": open_ended.load_mmvet,
    "llava_bench": open_ended.load_llava_bench,
    "refcoco": refcoco.load,
    "chartqa": documents.load_chartqa,
    "docvqa": documents.load_docvqa,
    "infovqa": documents.load_infovqa,
    "ocrbench": documents.load_ocrbench,
    "ai2d": exams.load_ai2d,
    "mmmu": exams.load_mmmu,
    "mmstar": exams.load_mmstar,
    "realworldqa": exams.load_realworldqa,
    "cvbench": exams.load_cvbench,
    "mathvista": documents.load_mathvista,
    "muirbench": exams.load_muirbench,
    "mvbench": videos.load_mvbench,
    "videomme": videos.load_videomme,
    "nextqa": videos.load_nextqa,
    "coco_captions": coco_captions.load,
}


def load_benchmark(name: str, root: str | Path, options: Mapping[str, Any]) -> Benchmark:
    """The benchmark `name` from the published files below `root`."""
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


def load_configured(
    config: ConfigDict, limit: int | None = None, shard: Shard | None = None
) -> list[tuple[ConfigDict, Benchmark]]:
    """The benchmark of an evaluation config, or those of its suite, each with its own config.

    A member of a suite without its files is left out, with a printed line; LlavaError if that
    leaves none. LlavaError if a picture of a question is missing (of this shard's questions).
    """
    if not config.suite:
        return [(config, _load(config, limit, shard))]
    default = _config("base")
    for key in ("benchmark", "max_new_tokens", "options"):
        if config[key] != default[key]:
            raise LlavaError(
                f"config.{key} is not used by a suite, whose members have their own: run "
                "configs/eval/NAME.py to change it"
            )
    loaded, missing = [], []
    for name in config.suite:
        member = _config(name)
        member.data_root = str(Path(config.data_root, Path(member.data_root).name))
        for key in ("batch_size", "dtype", "mesh", "sampling", "min_yes"):
            member[key] = config[key]
        try:
            loaded.append((member, _load(member, limit, shard)))
        except MissingFile as error:
            missing.append(f"{name} is left out: {error}")
    if not loaded:
        raise LlavaError(
            f"no benchmark of {', '.join(config.suite)} has its files below {config.data_root}; "
            f"{missing[0]}"
        )
    print("\n".join(missing), end="\n" if missing else "")
    return loaded


def _config(name: str) -> ConfigDict:
    """configs/eval/NAME.py."""
    try:
        return importlib.import_module(f"configs.eval.{name}").get_config()
    except ModuleNotFoundError:
        known = ", ".join(BENCHMARKS)
        raise LlavaError(f"unknown member {name!r} of config.suite: choose of {known}") from None


def _load(config: ConfigDict, limit: int | None, shard: Shard | None) -> Benchmark:
    benchmark = load_benchmark(config.benchmark, config.data_root, config.options.to_dict())
    if limit is not None:
        benchmark = benchmark.first(limit)
    check_images(shard.of(benchmark.questions) if shard else benchmark.questions, benchmark.source)
    return benchmark


__all__ = [
    "BENCHMARKS",
    "Benchmark",
    "MissingFile",
    "check_images",
    "load_benchmark",
    "load_configured",
    "table",
    "write_report",
]
