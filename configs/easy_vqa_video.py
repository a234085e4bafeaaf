"""Videos, on a laptop: where does a shape move, and which of two comes first?"""

from configs import easy_vqa_video_middle
from configs.easy_vqa_instruct import ROOT


def get_config():
    config = easy_vqa_video_middle.get_config()
    config.workdir = f"{ROOT}/video_frames"
    config.model.video.mode = "resize"
    config.model.video.pool = "bilinear"  # 4 tokens a frame
    config.model.video.newline = "frame"
    config.model.video.frames = 5
    config.data.train = f"{ROOT}/video/train.json"
    config.data.images_per_row = 20  # frames of four videos
    return config
