"""LLaVA-1.5 13B, stage 2: like 7B."""

from configs import llava15_7b_instruct
from configs.llava15_13b_align import ROOT


def get_config():
    config = llava15_7b_instruct.get_config()
    config.workdir = f"{ROOT}/instruct"
    config.model.preset = "llava-1.5-13b"
    config.init.checkpoint = f"{ROOT}/align"
    return config
