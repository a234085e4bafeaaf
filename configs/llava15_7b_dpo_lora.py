"""LLaVA-1.5 7B, preference tuning on RLAIF-V with LoRA; the model without it is the reference.

Rank, alpha, dropout and rate are those of RLAIF-V's script/train/llava15_train_lora.sh.
"""

from configs import llava15_7b_dpo
from configs.llava15_7b_align import ROOT


def get_config():
    config = llava15_7b_dpo.get_config()
    config.workdir = f"{ROOT}/dpo_lora"
    config.trainable = {"lora": 1e-5}
    config.lora.rank = 64
    config.lora.alpha = 16.0
    config.lora.targets = ("decoder/layers/*",)
    config.lora.dropout = 0.05
    return config
