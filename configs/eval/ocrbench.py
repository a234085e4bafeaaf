"""OCRBench: text in pictures of ten types, in points of 1,000."""

from configs.eval import base


def get_config():
    config = base.get_config()
    config.benchmark = "ocrbench"
    config.data_root = "data/eval/ocrbench"
    return config
