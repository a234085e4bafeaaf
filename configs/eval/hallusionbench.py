"""HallusionBench: yes/no questions with and without pictures, original and edited."""

from configs.eval import base


def get_config():
    config = base.get_config()
    config.benchmark = "hallusionbench"
    config.data_root = "data/eval/hallusionbench"
    return config
