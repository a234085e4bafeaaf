"""LLaVA-OneVision 0.5B, stage 2, OneVision: like 7B."""

from configs import onevision_7b_onevision
from configs.onevision_0p5b_align import ROOT


def get_config():
    config = onevision_7b_onevision.get_config()
    config.workdir = f"{ROOT}/onevision"
    config.model.preset = "onevision_0p5b"
    config.init.checkpoint = f"{ROOT}/single"
    return config
