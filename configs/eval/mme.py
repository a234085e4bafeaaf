"""MME: two yes/no questions per picture in fourteen categories, up to 2,000 and 800 points."""

from configs.eval import base


def get_config():
    config = base.get_config()
    config.benchmark = "mme"
    config.data_root = "data/eval/mme"
    return config
