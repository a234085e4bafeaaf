"""LLaVA-1.6 7B (Vicuna), stage 1: the projector learns to caption LCS-558K, as for LLaVA-1.5.

Pictures are cropped, not cut into tiles, so the model has no newline yet. Rate, batch and schedule
are those of LLaVA-1.5's stage 1 and of Open-LLaVA-NeXT, which reproduced 1.6; gradients are clipped
to a norm of 1, the Trainer's default, which LLaVA-NeXT's DeepSpeed files keep ("auto").
"""

from configs import llava15_7b_align

ROOT = "runs/llava16_7b"


def get_config():
    config = llava15_7b_align.get_config()
    config.workdir = f"{ROOT}/align"
    config.model.preset = "llava16_7b"
    config.optimizer.clip_norm = 1.0
    return config
