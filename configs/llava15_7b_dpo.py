"""LLaVA-1.5 7B, preference tuning on RLAIF-V: projector and language model, the encoder frozen.

Rate, beta, warm-up and decay are those of RLAIF-V's own training of this model
(https://github.com/RLHF-V/RLAIF-V, script/train/llava15_train.sh; arXiv:2405.17220), which takes
pairs one a device. A row of 2,048 tokens holds about two pairs here, whose picture and question are
stored once. To start from the published model: --config.init.checkpoint=weights/llava-1.5-7b-hf
--config.model.preset=
"""

from configs import base
from configs.llava15_7b_align import ROOT


def get_config():
    config = base.get_config()
    config.workdir = f"{ROOT}/dpo"
    config.model.preset = "llava-1.5-7b"
    config.model.image_mode = "pad"
    config.model.remat_policy = "full"
    config.init.checkpoint = f"{ROOT}/instruct"
    config.trainable = {"projector": 5e-7, "decoder": 5e-7}
    config.loss = "dpo"
    config.dpo.beta = 0.1
    # The Parquet files of https://huggingface.co/datasets/openbmb/RLAIF-V-Dataset. Those of
    # openbmb/RLHF-V-Dataset need data.columns = {"pair": "text"}.
    config.data.train = "data/RLAIF-V-Dataset"
    config.data.max_length = 2048
    config.data.images_per_row = 3
    config.data.workers = 8
    config.batch_size = 32
    config.epochs = 4
    config.optimizer.weight_decay = 0.01
    config.optimizer.warmup_ratio = 0.05
    config.loss_chunk = 256
    return config
