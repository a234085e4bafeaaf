"""Video-MME without subtitles: short, medium and long videos, options."""

from configs.eval import base


def get_config():
    config = base.get_config()
    config.benchmark = "videomme"
    config.data_root = "data/eval/videomme"
    config.options.ending = "answer"  # answer: as LLaVA-Video was asked | letter: as other models
    config.max_new_tokens = 16
    config.batch_size = 8
    return config
