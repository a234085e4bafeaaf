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
    config.data.max_length = 256  # one of five conversations is longer and loses its end
    config.data.images_per_row = 2
    config.batch_size = 4
    config.steps = 140
    config.loss_chunk = 16
    config.validate_every = 70
    config.save_every = 70
    return config
