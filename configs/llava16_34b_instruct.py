"""LLaVA-1.6 34B, stage 2: like 7B, in the words of Yi and at half its rate.

1e-5 is the rate of LLaVA-NeXT's own script (scripts/train/direct_finetune_clip.sh).
"""

from configs import llava16_7b_instruct
from configs.llava16_34b_align import ROOT


def get_config():
    config = llava16_7b_instruct.get_config()
    config.workdir = f"{ROOT}/instruct"
    config.model.preset = "llava16_34b"
    config.model.template = "chatml_direct"
    config.init.checkpoint = f"{ROOT}/align"
    config.trainable = {"vision": 2e-6, "projector": 1e-5, "decoder": 1e-5}
    config.batch_size = 128
    return config
