"""MMVP: pairs of pictures that CLIP confuses, one of two options each."""

from configs.eval import base


def get_config():
    config = base.get_config()
    config.benchmark = "mmvp"
    config.data_root = "data/eval/mmvp"
    config.max_new_tokens = 1024  # the original's limit
    return config
