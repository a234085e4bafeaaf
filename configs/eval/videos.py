"""The benchmarks of videos whose files are there."""

from configs.eval import base


def get_config():
    config = base.get_config()
    config.suite = ("mvbench", "videomme", "nextqa")
    config.data_root = "data/eval"
    return config
