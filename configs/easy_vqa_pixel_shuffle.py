r"""The quickstart's stage 1 with a projector that folds squares of 2x2 features into one token.

A picture of 112 pixels has 64 features and takes 16 tokens, as many as one of 56 pixels without
folding. Stage 2 takes the shape of the model from its start:

    python train.py --config=configs/easy_vqa_instruct.py \
        --config.init.checkpoint=runs/quickstart/pixel_shuffle_align \
        --config.workdir=runs/quickstart/pixel_shuffle_instruct
"""

from configs import easy_vqa_align
from configs.easy_vqa_align import ROOT


def get_config():
    config = easy_vqa_align.get_config()
    config.workdir = f"{ROOT}/pixel_shuffle_align"
    config.model.projector = "pixel_shuffle2_mlp2x_gelu"
    config.model.image_size = 112
    return config
