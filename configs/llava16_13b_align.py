"""LLaVA-1.6 13B (Vicuna), stage 1: like 7B, on Vicuna 13B v1.5."""

from configs import llava16_7b_align

ROOT = "runs/llava16_13b"


def get_config():
    config = llava16_7b_align.get_config()
    config.workdir = f"{ROOT}/align"
    config.model.preset = "llava16_13b"
    config.init.decoder = "weights/vicuna-13b-v1.5"
    return config
