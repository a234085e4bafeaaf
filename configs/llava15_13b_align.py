"""LLaVA-1.5 13B, stage 1: like 7B, on Vicuna 13B v1.5."""

from configs import llava15_7b_align

ROOT = "runs/llava15_13b"


def get_config():
    config = llava15_7b_align.get_config()
    config.workdir = f"{ROOT}/align"
    config.model.preset = "llava-1.5-13b"
    config.init.decoder = "weights/vicuna-13b-v1.5"
    return config
