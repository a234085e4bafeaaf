"""After the quickstart's stage 2: of two answers to a question the right one becomes likelier.

The data are written by `python -m llava_jax.quickstart.preferences`: questions about what is in the
picture and what is not, each with its right answer and a wrong one.
"""

from configs import easy_vqa_instruct
from configs.easy_vqa_instruct import ROOT


def get_config():
    config = easy_vqa_instruct.get_config()
    config.workdir = f"{ROOT}/preferences"
    config.init.checkpoint = f"{ROOT}/instruct"
    config.loss = "dpo"
    # An answer is one word: with 0.1 a loss of 0.1 takes a ratio of e^23 between two of them, and
    # in a trial at a rate of 5e-5 the right ones became unlikely too.
    config.dpo.beta = 1.0
    config.trainable = {"projector": 2e-5, "decoder": 2e-5}
    config.data.train = f"{ROOT}/preferences/train.json"
    config.data.validation = f"{ROOT}/preferences/val.json"
    config.data.max_length = 224
    config.data.images_per_row = 4  # a pair takes about 55 tokens, 16 of them its picture
    config.batch_size = 4
    config.steps = 30
    config.validate_every = 15
    config.save_every = 15
    return config
