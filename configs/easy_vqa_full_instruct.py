"""A second round of stage 2 on top of the quickstart's model, every answer learnt from the picture.

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
    # No question sees the answers before it, which give most of the later ones away.
    config.data.turns = "independent"
    config.seed = 1  # other conversations together in a row than in the first round
    config.steps = 150
    config.validate_every = 50
    config.save_every = 50
    return config
