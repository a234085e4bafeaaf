"""Quickstart, stage 2: projector and language model learn to answer questions on easy-VQA."""

from configs import base

ROOT = "runs/quickstart"


def get_config():
    config = base.get_config()
    config.workdir = f"{ROOT}/instruct"
    config.model.template = "chatml"
    config.init.checkpoint = f"{ROOT}/align"
    config.trainable = {"projector": 1e-3, "decoder": 2e-4}
    config.data.train = f"{ROOT}/easy_vqa/instruct.json"
    config.data.validation = f"{ROOT}/easy_vqa/val_instruct.json"
    config.data.image_root = f"{ROOT}/easy_vqa/images"
    # The first three or four questions of a picture; the later ones are cut off: the answers before
    # them give most of theirs away.
    config.data.max_length = 96
    config.data.images_per_row = 1
    config.batch_size = 6
    config.steps = 220
    config.loss_chunk = 8  # a row has about nine supervised tokens
    config.validate_every = 110
    config.save_every = 110
    return config
