"""easy-VQA: yes/no, shape and colour questions about one coloured shape, by exact match."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.benchmark = "easy_vqa"
    config.data = "runs/quickstart/easy_vqa/test_1000.json"  # test.json for all 9,673 questions
    config.image_root = ""  # where its image paths start; empty: `images` beside it
    config.max_new_tokens = 8  # the longest answer is one word
    config.batch_size = 64
    config.dtype = "auto"  # float32 | mixed (float32, bfloat16 products) | bfloat16 | auto
    return config
