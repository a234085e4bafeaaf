"""MVBench: 20 tasks about short videos, options."""

from configs.eval import base


def get_config():
    config = base.get_config()
    config.benchmark = "mvbench"
    config.data_root = "data/eval/mvbench"
    config.max_new_tokens = 16
    config.batch_size = 8
    return config
