"""Quickstart, stage 1: the projector learns to caption easy-VQA pictures; all else is frozen."""

from configs import base

ROOT = "runs/quickstart"


def get_config():
    config = base.get_config()
    config.workdir = f"{ROOT}/align"
    config.model.preset = "quickstart"
    config.model.template = "plain_chatml"
    config.init.vision = f"{ROOT}/parts/dinov2-vits14"
    config.init.decoder = f"{ROOT}/parts/smollm2-135m-instruct"
    config.trainable = {"projector": 3e-3}
    # With a warm-up of 5 steps instead of 24 the loss rose at first, and the rounding of the
    # processor decided how far the 160 steps then came.
    config.optimizer.b2 = 0.95
    config.optimizer.warmup_ratio = 0.15
    config.data.train = f"{ROOT}/easy_vqa/align.json"
    config.data.validation = f"{ROOT}/easy_vqa/val_align.json"
    config.data.image_root = f"{ROOT}/easy_vqa/images"
    config.data.max_length = 136  # six captions of 22 tokens, 5 of them supervised
    config.data.images_per_row = 6
    config.batch_size = 2
    config.steps = 160
    config.loss_chunk = 16
    config.validate_every = 80
    config.save_every = 80
    return config
