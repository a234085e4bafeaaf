"""VQAv2: questions on COCO pictures. test-dev2015 makes the server's file, val2014 a score."""

from configs.eval import base


def get_config():
    config = base.get_config()
    config.benchmark = "vqav2"
    config.data_root = "data/eval/vqav2"
    config.options.split = "test-dev2015"  # or val2014
    return config
