"""LLaVA-Bench (In-the-Wild): free answers for its GPT-4 reviewer."""

from configs.eval import base


def get_config():
    config = base.get_config()
    config.benchmark = "llava_bench"
    config.data_root = "data/eval/llava-bench-in-the-wild"
    config.max_new_tokens = 1024  # the original's limit for all but short answers
    return config
