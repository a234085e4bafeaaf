"""MMStar: questions with options that cannot be answered without the picture."""

from configs.eval import base


def get_config():
    config = base.get_config()
    config.benchmark = "mmstar"
    config.data_root = "data/eval/mmstar"
    return config
