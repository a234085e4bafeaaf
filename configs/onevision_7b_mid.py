"""LLaVA-OneVision 7B, stage 1.5: all of it learns, from 4M records of recaptioned and text data.

Rate 1e-5, the vision tower's 2e-6, 1 epoch, cosine schedule with 3% warm-up, no weight decay,
clipping at 1, pictures cut into grids of up to 6 x 6 tiles whose features are shrunk to about 9
(LLaVA-NeXT's scripts/train/README.md and finetune_si.sh). The published batch is 256 conversations:
64 rows of 16,384 tokens hold about as many. The published limit of a conversation is 32,768 tokens;
16,384 cut only those of more than 22 pictures, and attention within shorter rows costs less.

48 tiles are room for one picture of 37, the most there are, or for several smaller ones.
`--config.data.max_tiles=9 --config.data.images_per_row=24` trains on smaller grids, at half the
tower's cost; the model keeps all its grids for inference.
"""

from configs import base
from configs.onevision_7b_align import ROOT


def get_config():
    config = base.get_config()
    config.workdir = f"{ROOT}/mid"
    config.model.preset = "onevision_7b"
    config.model.template = "chatml"
    config.model.remat_policy = "full"
    config.init.checkpoint = f"{ROOT}/align"
    config.trainable = {"vision": 2e-6, "projector": 1e-5, "decoder": 1e-5}
    # A list of files, as LLaVA-NeXT's scripts/train/mid_stage.yaml; image paths start from below.
    config.data.train = "data/onevision/mid_stage.yaml"
    config.data.image_root = "data/onevision/images"
    config.data.max_length = 16384
    config.data.images_per_row = 48
    config.data.workers = 8
    config.batch_size = 64
    config.accumulation = 4
    config.epochs = 1
    config.optimizer.clip_norm = 1.0
    config.loss_chunk = 256
    return config
