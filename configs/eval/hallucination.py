"""Every benchmark of hallucination whose files are in its folder, data_root/NAME."""

from configs.eval import base


def get_config():
    config = base.get_config()
    config.suite = ("pope", "repope", "amber", "chair", "hallusionbench", "naturalbench", "mmvp")
    config.data_root = "data/eval"
    return config
