"""MM-Vet: free answers for its GPT-4 evaluator."""

from configs.eval import base


def get_config():
    config = base.get_config()
    config.benchmark = "mmvet"
    config.data_root = "data/eval/mmvet"
    config.max_new_tokens = 1024  # the original's limit for all but short answers
    return config
