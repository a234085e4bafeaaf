"""RePOPE: POPE with wrong labels corrected and ambiguous questions left out."""

from configs.eval import base


def get_config():
    config = base.get_config()
    config.benchmark = "repope"
    config.data_root = "data/eval/repope"
    return config
