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
    config.data.max_length = 512  # two or three conversations
    config.data.images_per_row = 4
    config.batch_size = 2
    config.steps = 130
    config.loss_chunk = 32
    config.validate_every = 65
    config.save_every = 65
    return config
