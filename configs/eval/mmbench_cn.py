"""MMBench in Chinese."""

from configs.eval import base


def get_config():
    config = base.get_config()
    config.benchmark = "mmbench"
    config.data_root = "data/eval/mmbench"
    config.options.file = "mmbench_dev_cn_20231003.tsv"
    config.options.language = "cn"  # language of the sentence that asks for a letter
    config.max_new_tokens = 1024  # the original's limit for all but short answers
    return config
