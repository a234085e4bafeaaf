"""Several pictures in a prompt, on a laptop: in which of them is the shape red?"""

from configs import easy_vqa_instruct
from configs.easy_vqa_instruct import ROOT


def get_config():
    config = easy_vqa_instruct.get_config()
    config.workdir = f"{ROOT}/several_pictures"
    config.init.checkpoint = f"{ROOT}/instruct"
    config.trainable = {"projector": 3e-4, "decoder": 1e-4}
    config.data.train = f"{ROOT}/several/train.json"
    config.data.validation = ""
    config.data.image_root = f"{ROOT}/several/images"
    config.data.max_length = 208  # four pictures with their numbers take 85 tokens, a question 18
    config.data.images_per_row = 4
    config.steps = 160
    return config
