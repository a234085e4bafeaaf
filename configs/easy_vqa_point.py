"""After the quickstart's stage 2: the model learns to answer with boxes, and about boxes.

The data are written by `python -m llava_jax.quickstart.boxes`: questions about boxes, and a part of
the old conversations.
"""

from configs import easy_vqa_instruct
from configs.easy_vqa_instruct import ROOT


def get_config():
    config = easy_vqa_instruct.get_config()
    config.workdir = f"{ROOT}/point"
    config.init.checkpoint = f"{ROOT}/instruct"
    config.data.train = f"{ROOT}/boxes/train.json"
    config.data.validation = f"{ROOT}/boxes/val.json"
    config.data.image_root = ROOT
    config.data.images_per_row = 3
    config.data.turns = "independent"  # one shape's box does not help to find another's
    config.trainable = {"projector": 5e-4, "decoder": 3e-4}
    config.optimizer.b2 = 0.95
    config.batch_size = 4
    config.steps = 480
    config.validate_every = 160
    config.save_every = 160
    config.seed = 1  # other old conversations together in a row than in stage 2
    return config
