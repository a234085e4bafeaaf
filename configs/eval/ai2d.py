"""AI2D: school diagrams with masked labels, and options."""

from configs.eval import base


def get_config():
    config = base.get_config()
    config.benchmark = "ai2d"
    config.data_root = "data/eval/ai2d"
    config.max_new_tokens = 16
    return config
