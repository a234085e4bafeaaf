"""SEED-Bench: questions with options on pictures and frames of videos."""

from configs.eval import base


def get_config():
    config = base.get_config()
    config.benchmark = "seed"
    config.data_root = "data/eval/seed_bench"
    return config
