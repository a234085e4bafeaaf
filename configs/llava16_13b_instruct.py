"""LLaVA-1.6 13B (Vicuna), stage 2: like 7B."""

from configs import llava16_7b_instruct
from configs.llava16_13b_align import ROOT


def get_config():
    config = llava16_7b_instruct.get_config()
    config.workdir = f"{ROOT}/instruct"
    config.model.preset = "llava16_13b"
    config.init.checkpoint = f"{ROOT}/align"
    return config
