"""ScienceQA: school questions with options; LLaVA-1.5 reports those with a picture."""

from configs.eval import base


def get_config():
    config = base.get_config()
    config.benchmark = "scienceqa"
    config.data_root = "data/eval/scienceqa"
    config.max_new_tokens = 1024  # the original's limit for all but short answers
    return config
