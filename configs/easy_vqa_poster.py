"""Pictures in tiles, on a laptop: the quickstart's model learns to look into a poster's corners."""

from configs import easy_vqa_poster_one_view
from configs.easy_vqa_instruct import ROOT


def get_config():
    config = easy_vqa_poster_one_view.get_config()
    config.workdir = f"{ROOT}/poster_tiles"
    config.model.image_mode = "anyres"
    config.model.tiling.grids = "3x3"
    config.model.tiling.merge = "flat"  # a corner is one run of tokens, as a picture was before
    config.data.images_per_row = 10  # tiles of one poster: the whole, and nine
    config.data.max_length = 328  # 10 x 16 tokens of a poster, and eight questions
    return config
