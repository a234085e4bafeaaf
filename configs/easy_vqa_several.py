"""Several pictures in a prompt, on a laptop: in which of them is the shape red?"""

from configs import easy_vqa_instruct
from configs.easy_vqa_instruct import ROOT


def get_config():
    config = easy_vqa_instruct.get_config()
    config.workdir = f"{ROOT}/several_pictures"
    config.init.checkpoint = f"{ROOT}/instruct"
    config.trainable = {"projector": 5e-4, "decoder": 3e-4}
    config.optimizer.b2 = 0.95  # a memory of 20 steps of 220
    config.data.train = f"{ROOT}/several/train.json"
    config.data.validation = ""
    config.data.image_root = f"{ROOT}/several/images"
    config.data.max_length = 256  # four pictures with their numbers take 85 tokens, a question 18
    config.data.images_per_row = 4
    config.data.turns = "independent"  # as they are asked in the test: no answer helps another
    config.batch_size = 4  # twice the steps at three times the rate learn more from as many tokens
    config.steps = 220
    return config
