"""LLaVA-OneVision 7B, stage 2, single image: like stage 1.5, on 3.2M instructions.

Numbers: LLaVA-NeXT's scripts/train/finetune_si.sh.
"""

from configs import onevision_7b_mid
from configs.onevision_7b_align import ROOT


def get_config():
    config = onevision_7b_mid.get_config()
    config.workdir = f"{ROOT}/single"
    config.init.checkpoint = f"{ROOT}/mid"
    config.data.train = "data/onevision/single_image.yaml"
    return config
