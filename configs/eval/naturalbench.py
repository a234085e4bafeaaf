"""NaturalBench: two questions about each of two pictures, with opposite answers."""

from configs.eval import base


def get_config():
    config = base.get_config()
    config.benchmark = "naturalbench"
    config.data_root = "data/eval/naturalbench"
    config.max_new_tokens = 16
    return config
