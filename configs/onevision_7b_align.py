"""LLaVA-OneVision 7B, stage 1: the projector learns to caption LCS-558K; the rest is frozen.

Rate 1e-3, 1 epoch, pictures squashed to one tile and not cut (LLaVA-NeXT's
scripts/train/pretrain_siglip.sh); its 16 captions a GPU on an unpublished number of GPUs are 256
here, as for LLaVA-1.5. Gradients are clipped to a norm of 1, as its DeepSpeed files do ("auto").
"""

from configs import llava15_7b_align

ROOT = "runs/onevision_7b"


def get_config():
    config = llava15_7b_align.get_config()
    config.workdir = f"{ROOT}/align"
    config.model.preset = "onevision_7b"
    config.model.image_mode = "resize"
    config.init.vision = "weights/siglip-so400m-patch14-384"
    config.init.decoder = "weights/Qwen2-7B-Instruct"
    config.data.max_length = 896  # a picture of 729 tokens and 167 for its caption
    config.optimizer.clip_norm = 1.0
    return config
