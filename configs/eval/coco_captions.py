"""COCO captions: one sentence per picture, scored by CIDEr."""

from configs.eval import base


def get_config():
    config = base.get_config()
    config.benchmark = "coco_captions"
    config.data_root = "data/eval/coco"
    config.options.split = "val2014"  # or val2017
    return config
