"""LLaVA-OneVision 0.5B, stage 1: like 7B, on Qwen2 0.5B."""

from configs import onevision_7b_align

ROOT = "runs/onevision_0p5b"


def get_config():
    config = onevision_7b_align.get_config()
    config.workdir = f"{ROOT}/align"
    config.model.preset = "onevision_0p5b"
    config.init.decoder = "weights/Qwen2-0.5B-Instruct"
    return config
