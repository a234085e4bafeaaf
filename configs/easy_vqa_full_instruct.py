"""easy-VQA to the end: the quickstart's stage 2, longer, from the TFDS ArrayRecord set."""

from configs import easy_vqa_instruct
from configs.easy_vqa_instruct import ROOT


def get_config():
    config = easy_vqa_instruct.get_config()
    config.workdir = f"{ROOT}/full_instruct"
    config.data.train = f"{ROOT}/easy_vqa/tfds/easy_vqa_instruct"
    config.steps = 600
    config.validate_every = 100
    config.save_every = 100
    return config
