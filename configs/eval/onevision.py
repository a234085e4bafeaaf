"""The benchmarks of the LLaVA-OneVision paper whose files are there; videos excepted."""

from configs.eval import base


def get_config():
    config = base.get_config()
    config.suite = (
        "ai2d", "chartqa", "docvqa", "infovqa", "mathvista", "mmbench", "mme", "mmmu", "mmstar",
        "mmvet", "ocrbench", "realworldqa", "scienceqa", "seed", "muirbench",
    )  # fmt: skip
    config.data_root = "data/eval"
    return config
