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
    # Whole conversations: from as many questions each on its own, yes/no stayed at the blind score.
    # One a row, the longest cut by a third: rows of twice the length take 1.6 times the time.
    config.data.max_length = 224
    config.data.images_per_row = 1
    config.batch_size = 8
    config.steps = 160
    config.loss_chunk = 24  # a row has about 20 supervised tokens
    config.validate_every = 80
    config.save_every = 80
    return config
