"""Benchmarks: the questions and the metric of each, and one runner for all."""

from llava_jax.evaluation import easy_vqa
from llava_jax.evaluation.runner import evaluate, table

BENCHMARKS = {"easy_vqa": easy_vqa.load}

__all__ = ["BENCHMARKS", "evaluate", "table"]
