"""What every benchmark's config has; each is a small difference on this."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.benchmark = ""  # a name of llava_jax.evaluation.BENCHMARKS
    config.data_root = ""  # folder of the benchmark's published files
    config.options = ConfigDict()  # what else its loader takes
    config.max_new_tokens = 128  # the original's limit for short answers
    config.batch_size = 64
    config.dtype = "auto"  # float32 | mixed (float32, bfloat16 products) | bfloat16 | auto
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})  # of all devices; -1: the rest
    return config
