"""RealWorldQA: pictures from cars and streets."""

from configs.eval import base


def get_config():
    config = base.get_config()
    config.benchmark = "realworldqa"
    config.data_root = "data/eval/realworldqa"
    config.max_new_tokens = 16
    return config
