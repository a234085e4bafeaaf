"""NExT-QA: causal, temporal and descriptive questions about videos, five options."""

from configs.eval import base


def get_config():
    config = base.get_config()
    config.benchmark = "nextqa"
    config.data_root = "data/eval/nextqa"
    config.options.seed = 0  # draws a letter for answers without one
    config.max_new_tokens = 1024
    config.batch_size = 8
    return config
