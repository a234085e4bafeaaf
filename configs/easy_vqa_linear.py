r"""The quickstart's stage 1 with the linear projector of the first LLaVA, from stored features.

What the encoder sees is stored once for this and for other trials, whatever projector and rate:

    python train.py --config=configs/easy_vqa_linear.py
    python train.py --config=configs/easy_vqa_linear.py --config.trainable.projector=1e-3 \
        --config.workdir=runs/quickstart/linear_slow
"""

from configs import easy_vqa_align
from configs.easy_vqa_align import ROOT


def get_config():
    config = easy_vqa_align.get_config()
    config.workdir = f"{ROOT}/linear"
    config.model.projector = "linear"
    config.features.folder = f"{ROOT}/features"
    return config
