"""DocVQA: questions about scanned documents, scored by ANLS."""

from configs.eval import base


def get_config():
    config = base.get_config()
    config.benchmark = "docvqa"
    config.data_root = "data/eval/docvqa"
    config.options.split = "validation"  # or test, for the server
    config.max_new_tokens = 32
    return config
