"""LLaVA-OneVision 0.5B, stage 1.5: like 7B."""

from configs import onevision_7b_mid
from configs.onevision_0p5b_align import ROOT


def get_config():
    config = onevision_7b_mid.get_config()
    config.workdir = f"{ROOT}/mid"
    config.model.preset = "onevision_0p5b"
    config.init.checkpoint = f"{ROOT}/align"
    return config
