"""LLaVA v1 7B, stage 2: projector and language model learn from LLaVA-Instruct-158K.

Hyper-parameters of the published run: 3 epochs, batch 32, rate 2e-5, cosine with 3% warm-up, no
weight decay, no clipping. `batch_size` counts rows of 2,048 tokens. Packed, one holds several
conversations (256 tokens of picture and a few hundred of text each): with 32 rows an update sees
more of them than the published 32. For as many updates as published give
--config.data.packing=False, or fewer rows: 8 if a row holds four, as the start tells.
"""

from configs import base
from configs.llava_v1_7b_align import ROOT


def get_config():
    config = base.get_config()
    config.workdir = f"{ROOT}/instruct"
    config.model.preset = "llava-v1-7b"
    config.model.remat_policy = "full"
    config.init.checkpoint = f"{ROOT}/align"
    config.trainable = {"projector": 2e-5, "decoder": 2e-5}
    # https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K; images: COCO train2017
    config.data.train = "data/llava_instruct_158k.json"
    config.data.image_root = "data/images/coco/train2017"
    config.data.max_length = 2048
    config.data.images_per_row = 6
    config.data.workers = 8
    config.batch_size = 32
    config.accumulation = 4
    config.epochs = 3
    config.optimizer.clip_norm = 0.0
    config.loss_chunk = 256
    return config
