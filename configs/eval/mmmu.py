"""MMMU: college questions of 30 subjects, with up to seven pictures."""

from configs.eval import base


def get_config():
    config = base.get_config()
    config.benchmark = "mmmu"
    config.data_root = "data/eval/mmmu"
    config.options.seed = 0  # draws a letter if none can be read
    return config
