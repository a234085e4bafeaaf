"""CHAIR: objects in descriptions of COCO pictures that are not there."""

from configs.eval import base


def get_config():
    config = base.get_config()
    config.benchmark = "chair"
    config.data_root = "data/eval/chair"
    config.options.count = 500
    config.options.seed = 0
    config.max_new_tokens = 512
    return config
