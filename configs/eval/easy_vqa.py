"""easy-VQA: yes/no, shape and colour questions about one coloured shape, by exact match."""

from configs.eval import base


def get_config():
    config = base.get_config()
    config.benchmark = "easy_vqa"
    config.data_root = "runs/quickstart/easy_vqa"
    config.options.split = "test_1000"  # test: all 9,673 questions
    config.max_new_tokens = 8  # the longest answer is one word
    return config
