"""CV-Bench: options about 2D and 3D relations of objects."""

from configs.eval import base


def get_config():
    config = base.get_config()
    config.benchmark = "cvbench"
    config.data_root = "data/eval/cvbench"
    config.max_new_tokens = 1024
    return config
