"""MathVista: mathematics in pictures; a language model extracts the answers."""

from configs.eval import base


def get_config():
    config = base.get_config()
    config.benchmark = "mathvista"
    config.data_root = "data/eval/mathvista"
    config.options.split = "testmini"  # or test
    config.max_new_tokens = 1024
    return config
