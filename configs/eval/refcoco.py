"""RefCOCO, RefCOCO+ and RefCOCOg: the box of the object that a sentence describes."""

from configs.eval import base


def get_config():
    config = base.get_config()
    config.benchmark = "refcoco"
    config.data_root = "data/eval/refcoco"
    config.options.name = "refcoco"  # or refcoco+, refcocog
    config.options.split = "val"  # or testA, testB; of refcocog val, test
    return config
