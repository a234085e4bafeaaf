"""LLaVA-OneVision 0.5B, stage 2, single image: like 7B."""

from configs import onevision_7b_single
from configs.onevision_0p5b_align import ROOT


def get_config():
    config = onevision_7b_single.get_config()
    config.workdir = f"{ROOT}/single"
    config.model.preset = "onevision_0p5b"
    config.init.checkpoint = f"{ROOT}/mid"
    return config
