"""easy-VQA to the end, stage 1: as the quickstart's, longer, from the TFDS ArrayRecord set."""

from configs import easy_vqa_align
from configs.easy_vqa_align import ROOT


def get_config():
    config = easy_vqa_align.get_config()
    config.workdir = f"{ROOT}/full_align"
    config.data.train = f"{ROOT}/easy_vqa/tfds/easy_vqa_align"
    config.steps = 400
    return config
