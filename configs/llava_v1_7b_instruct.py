"""LLaVA v1 7B, stage 2: projector and language model learn from LLaVA-Instruct-158K.

Hyper-parameters of the published run: 3 epochs, batch 32, learning rate 2e-5, cosine schedule with
3% warm-up, no weight decay, no clipping. `batch_size` counts rows of 2,048 tokens. A packed row
holds several conversations (256 tokens of picture and a few hundred of text each), so an update on
32 rows sees more than the published 32 conversations. For the published number of updates use
--config.data.packing=False, or fewer rows: 8 if the first lines of the run show four conversations
a row.
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
