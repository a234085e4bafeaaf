"""LLaVA-1.5 7B, stage 2 with LoRA on every linear layer of the language model.

Rank, alpha, dropout and both learning rates are the published ones.
"""

from configs import llava15_7b_instruct
from configs.llava15_7b_align import ROOT


def get_config():
    config = llava15_7b_instruct.get_config()
    config.workdir = f"{ROOT}/instruct_lora"
    config.trainable = {"projector": 2e-5, "lora": 2e-4}
    config.lora.rank = 128
    config.lora.alpha = 256.0
    config.lora.targets = ("decoder/layers/*",)
    config.lora.dropout = 0.05
    return config
