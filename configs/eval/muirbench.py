"""MuirBench: questions about several pictures, with options."""

from configs.eval import base


def get_config():
    config = base.get_config()
    config.benchmark = "muirbench"
    config.data_root = "data/eval/muirbench"
    config.max_new_tokens = 16
    return config
