"""What easy_vqa_poster.py is compared with: the same, but a poster is one small square."""

from configs import easy_vqa_instruct
from configs.easy_vqa_instruct import ROOT


def get_config():
    config = easy_vqa_instruct.get_config()
    config.workdir = f"{ROOT}/poster_one_view"
    config.init.checkpoint = f"{ROOT}/instruct"
    config.trainable = {"projector": 5e-4, "decoder": 3e-4}
    config.optimizer.b2 = 0.95
    config.data.train = f"{ROOT}/poster/train.json"
    config.data.validation = ""
    config.data.image_root = f"{ROOT}/poster/images"
    config.data.max_length = 184  # 16 tokens of a poster, and eight questions
    config.data.turns = "independent"  # as they are asked in the test: no answer helps another
    config.batch_size = 4
    config.steps = 200
    return config
