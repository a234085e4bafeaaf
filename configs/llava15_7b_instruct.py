"""LLaVA-1.5 7B, stage 2: projector and language model learn from the 665K instruction mix.

Hyper-parameters of the published run: 1 epoch, learning rate 2e-5, cosine schedule with 3% warm-up,
no weight decay, no clipping. `batch_size` counts rows of 2,048 tokens. A packed row holds two or
more conversations, so an update on 128 rows sees more than the published 128 conversations. For the
published number of updates use --config.batch_size=64, for the published loss --config.parity.
"""

from configs import base
from configs.llava15_7b_align import ROOT


def get_config():
    config = base.get_config()
    config.workdir = f"{ROOT}/instruct"
    config.model.preset = "llava-1.5-7b"
    config.model.image_mode = "pad"
    config.model.remat_policy = "full"
    config.init.checkpoint = f"{ROOT}/align"
    config.trainable = {"projector": 2e-5, "decoder": 2e-5}
    # https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K. Under image_root:
    # coco/train2017, gqa/images, ocr_vqa/images, textvqa/train_images, vg/VG_100K, vg/VG_100K_2.
    config.data.train = "data/llava_v1_5_mix665k.json"
    config.data.image_root = "data/images"
    config.data.max_length = 2048
    config.data.images_per_row = 3  # a picture takes 576 tokens, so no more fit
    config.data.workers = 8
    config.batch_size = 128
    config.accumulation = 4  # fewer are faster if memory allows: --dry_run=… --fit
    config.epochs = 1
    config.optimizer.clip_norm = 0.0
    config.loss_chunk = 256
    return config
