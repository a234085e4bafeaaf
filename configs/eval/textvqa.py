"""TextVQA: questions on text in pictures, by M4C's soft accuracy."""

from configs.eval import base


def get_config():
    config = base.get_config()
    config.benchmark = "textvqa"
    config.data_root = "data/eval/textvqa"
    return config
