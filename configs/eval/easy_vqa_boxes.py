"""Pointing on easy-VQA: the box of a shape, and what is at a box, of one shape and of mosaics."""

from configs.eval import base


def get_config():
    config = base.get_config()
    config.benchmark = "easy_vqa_boxes"
    config.data_root = "runs/quickstart"
    config.options.split = "test"
    config.max_new_tokens = 32  # a box has about 25
    return config
