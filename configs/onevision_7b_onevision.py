"""LLaVA-OneVision 7B, stage 2, OneVision: like the stage before, on 1.6M records.

Single pictures, several, each of which is one padded tile, and videos of up to 32 frames. Numbers:
LLaVA-NeXT's scripts/train/finetune_ov.sh.
"""

from configs import onevision_7b_single
from configs.onevision_7b_align import ROOT


def get_config():
    config = onevision_7b_single.get_config()
    config.workdir = f"{ROOT}/onevision"
    config.init.checkpoint = f"{ROOT}/single"
    config.data.train = "data/onevision/onevision.yaml"
    config.data.video_frames = 32
    return config
