"""VizWiz: blind people's pictures and questions; makes the server's file."""

from configs.eval import base


def get_config():
    config = base.get_config()
    config.benchmark = "vizwiz"
    config.data_root = "data/eval/vizwiz"
    return config
