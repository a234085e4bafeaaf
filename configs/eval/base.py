"""The options of every benchmark; each config is a small difference on this."""

from ml_collections import ConfigDict

FREE = ("options",)  # sections whose keys are up to the benchmark; see llava_jax/command.py


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.benchmark = ""  # a name of llava_jax.evaluation.BENCHMARKS
    config.suite = ()  # names in configs/eval, to run several in place of `benchmark`
    config.data_root = ""  # folder of the published files; of a suite: of the folders of all
    config.options = ConfigDict()  # further arguments of the benchmark's loader
    config.max_new_tokens = 128  # the original's limit for short answers
    config.sampling = ConfigDict()
    config.sampling.temperature = 0.0  # 0: the likeliest token
    config.sampling.seed = 0
    config.sampling.contrast = ""  # blur | noise | absent, see docs/use/hallucination.md
    config.sampling.contrast_alpha = 1.0
    config.sampling.contrast_beta = 0.1
    config.min_yes = 0.0  # the least confidence for yes; below it the answer is no
    config.batch_size = 64
    config.dtype = "auto"  # float32 | mixed (float32, bfloat16 products) | bfloat16 | auto
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})  # -1: all remaining devices
    return config
