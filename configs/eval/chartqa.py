"""ChartQA: questions about charts; numbers count if they are within 5%."""

from configs.eval import base


def get_config():
    config = base.get_config()
    config.benchmark = "chartqa"
    config.data_root = "data/eval/chartqa"
    config.max_new_tokens = 16
    return config
