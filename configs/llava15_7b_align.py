"""LLaVA-1.5 7B, stage 1: the projector learns to caption LCS-558K; everything else is frozen.

Hyper-parameters of the published run: 1 epoch, learning rate 1e-3, cosine schedule with 3% warm-up,
no weight decay. A row holds one caption, so 256 rows are the published batch.
"""

from configs import base

ROOT = "runs/llava15_7b"


def get_config():
    config = base.get_config()
    config.workdir = f"{ROOT}/align"
    config.model.preset = "llava-1.5-7b"
    config.model.template = "plain"
    config.model.image_mode = "square"  # stage 1 crops pictures, stage 2 pads them
    config.model.remat_policy = "full"
    config.init.vision = "weights/clip-vit-large-patch14-336"
    config.init.decoder = "weights/vicuna-7b-v1.5"
    config.trainable = {"projector": 1e-3}
    # https://huggingface.co/datasets/liuhaotian/LLaVA-Pretrain, with images.zip unpacked
    config.data.train = "data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json"
    config.data.image_root = "data/LLaVA-Pretrain/images"
    config.data.max_length = 640  # a picture of 576 tokens and 64 for its caption
    config.data.images_per_row = 1
    config.data.workers = 8
    config.batch_size = 256
    config.accumulation = 4
    config.epochs = 1
    config.optimizer.clip_norm = 0.0
    return config
