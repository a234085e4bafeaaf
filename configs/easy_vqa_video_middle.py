"""What easy_vqa_video.py is compared with: the same, but the middle frame is all that is seen."""

from configs import easy_vqa_instruct
from configs.easy_vqa_instruct import ROOT


def get_config():
    config = easy_vqa_instruct.get_config()
    config.workdir = f"{ROOT}/video_middle"
    config.init.checkpoint = f"{ROOT}/instruct"
    config.trainable = {"projector": 5e-4, "decoder": 3e-4}
    config.optimizer.b2 = 0.95  # a memory of 20 steps of 220
    config.data.train = f"{ROOT}/video/train_ablation.json"
    config.data.validation = ""
    config.data.image_root = f"{ROOT}/video/images"
    config.data.max_length = 288  # two or three videos with their questions
    config.data.images_per_row = 4
    config.data.turns = "independent"  # as they are asked in the test: no answer helps another
    config.batch_size = 4
    config.steps = 220
    return config
