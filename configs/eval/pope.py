"""POPE: is there a ... in the picture? Measures hallucination."""

from configs.eval import base


def get_config():
    config = base.get_config()
    config.benchmark = "pope"
    config.data_root = "data/eval/pope"
    return config
