"""LLaVA-1.6 34B, stage 1: like 7B, on Nous-Hermes-2-Yi-34B."""

from configs import llava16_7b_align

ROOT = "runs/llava16_34b"


def get_config():
    config = llava16_7b_align.get_config()
    config.workdir = f"{ROOT}/align"
    config.model.preset = "llava16_34b"
    config.init.decoder = "weights/Nous-Hermes-2-Yi-34B"
    return config
