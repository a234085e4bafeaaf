"""MMBench in English: questions with options, each in every order."""

from configs.eval import base


def get_config():
    config = base.get_config()
    config.benchmark = "mmbench"
    config.data_root = "data/eval/mmbench"
    config.options.file = "mmbench_dev_20230712.tsv"
    config.options.language = "en"  # language of the sentence that asks for a letter
    config.max_new_tokens = 1024  # the original's limit for all but short answers
    return config
