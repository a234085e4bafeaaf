"""AMBER: yes/no questions about objects, attributes and relations that are there or not."""

from configs.eval import base


def get_config():
    config = base.get_config()
    config.benchmark = "amber"
    config.data_root = "data/eval/amber"
    config.options.part = "discriminative"
    return config
