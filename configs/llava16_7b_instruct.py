"""LLaVA-1.6 7B (Vicuna), stage 2: all of it learns, from pictures cut into up to five tiles.

1 epoch, cosine schedule with 3% warm-up, no weight decay, conversations of up to 4,096 tokens. The
rate of the vision tower, 2e-6, stands in the released models' config; the others' and the batch of
128 conversations, which are not published, are Open-LLaVA-NeXT's. Clipping as in stage 1. The
newline, drawn at the start, learns at the language model's rate, which the projector has too.

A row of 8,192 tokens and 15 tiles holds three conversations about a large picture: of pictures of
300 to 4,000 pixels a side it leaves 2% of its tokens and 5% of its tiles empty, one of 4,096 tokens
a third of its tokens. So an update on 64 rows sees about 200 conversations.
"""

from configs import base
from configs.llava16_7b_align import ROOT


def get_config():
    config = base.get_config()
    config.workdir = f"{ROOT}/instruct"
    config.model.preset = "llava16_7b"
    config.model.remat_policy = "full"
    config.init.checkpoint = f"{ROOT}/align"
    config.trainable = {"vision": 2e-6, "projector": 2e-5, "decoder": 2e-5}
    # https://huggingface.co/datasets/lmms-lab/LLaVA-NeXT-Data, with its archives unpacked
    config.data.train = "data/LLaVA-NeXT-Data/llava_next_raw_format_processed.json"
    config.data.image_root = "data/LLaVA-NeXT-Data"
    config.data.max_length = 4096
    config.data.row_length = 8192
    config.data.images_per_row = 15
    config.data.workers = 8
    config.batch_size = 64
    config.accumulation = 4
    config.epochs = 1
    config.optimizer.clip_norm = 1.0
    config.loss_chunk = 256
    return config
