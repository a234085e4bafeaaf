"""LLaVA v1 7B, stage 1: a linear projector learns to caption CC3M-595K; everything else is frozen.

Hyper-parameters of the published run: 1 epoch, learning rate 2e-3, cosine schedule with 3% warm-up.
A row packs two captions, so 64 rows are the published batch of 128.
"""

from configs import base

ROOT = "runs/llava_v1_7b"


def get_config():
    config = base.get_config()
    config.workdir = f"{ROOT}/align"
    config.model.preset = "llava-v1-7b"
    config.model.template = "plain"
    config.model.remat_policy = "full"
    config.init.vision = "weights/clip-vit-large-patch14"
    config.init.decoder = "weights/vicuna-7b-v1.1"
    config.trainable = {"projector": 2e-3}
    # https://huggingface.co/datasets/liuhaotian/LLaVA-CC3M-Pretrain-595K, with images.zip unpacked
    config.data.train = "data/LLaVA-CC3M-Pretrain-595K/chat.json"
    config.data.image_root = "data/LLaVA-CC3M-Pretrain-595K/images"
    config.data.max_length = 640  # two pictures of 256 tokens, and 64 for each caption
    config.data.images_per_row = 2
    config.data.workers = 8
    config.batch_size = 64
    config.accumulation = 4
    config.epochs = 1
    config.optimizer.clip_norm = 0.0
    return config
