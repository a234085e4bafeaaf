"""AMBER: yes/no questions about objects, attributes and relations that are there or not.

The descriptions: --config.options.part=generative --config.max_new_tokens=512.
"""

from configs.eval import base


def get_config():
    config = base.get_config()
    config.benchmark = "amber"
    config.data_root = "data/eval/amber"
    config.options.part = "discriminative"  # or generative
    return config
