"""The benchmarks of the LLaVA-1.5 paper whose files are there."""

from configs.eval import base


def get_config():
    config = base.get_config()
    config.suite = (
        "vqav2", "gqa", "vizwiz", "scienceqa", "textvqa", "pope", "mme", "mmbench", "mmbench_cn",
        "seed", "llava_bench", "mmvet",
    )  # fmt: skip
    config.data_root = "data/eval"
    return config
