"""What easy_vqa_video.py is compared with: the same, but the middle frame is all that is seen."""

from configs import easy_vqa_instruct
from configs.easy_vqa_instruct import ROOT


def get_config():
    config = easy_vqa_instruct.get_config()
    config.workdir = f"{ROOT}/video_middle"
    config.init.checkpoint = f"{ROOT}/instruct"
    config.trainable = {"projector": 3e-4, "decoder": 1e-4}
    config.data.train = f"{ROOT}/video/train_ablation.json"
    config.data.validation = ""
    config.data.image_root = f"{ROOT}/video/images"
    config.data.images_per_row = 4
    config.steps = 160
    return config
