"""GQA: the balanced test-dev questions about scene graphs, by exact match."""

from configs.eval import base


def get_config():
    config = base.get_config()
    config.benchmark = "gqa"
    config.data_root = "data/eval/gqa"
    return config
