"""A second, longer round of stage 2 on top of the quickstart's model, with whole conversations.

Reads the TFDS ArrayRecord set in place of the JSON: the same records.
"""

from configs import easy_vqa_instruct
from configs.easy_vqa_instruct import ROOT


def get_config():
    config = easy_vqa_instruct.get_config()
    config.workdir = f"{ROOT}/full_instruct"
    config.init.checkpoint = f"{ROOT}/instruct"
    config.trainable = {"projector": 5e-4, "decoder": 1e-4}
    config.data.train = f"{ROOT}/easy_vqa/tfds/easy_vqa_instruct"
    config.data.max_length = 512
    config.data.images_per_row = 4
    config.batch_size = 2
    config.seed = 1  # other conversations together in a row than in the first round
    config.steps = 300
    config.validate_every = 100
    config.save_every = 100
    return config
