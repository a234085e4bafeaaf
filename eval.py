"""Scores a checkpoint on a benchmark, or on a suite of them.

    python eval.py --config=configs/eval/easy_vqa.py --checkpoint=runs/llava

Writes answers, scores and a page of failures below --output, and there report.md over all
benchmarks. If it is interrupted, the same command continues. --shard=i/n answers one of n parts,
on as many machines as you like; the command without --shard then collects the answers and scores.
"""

import math
from pathlib import Path

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from configs.eval import base
from llava_jax import command
from llava_jax.evaluation import Benchmark, Shard, load_configured, write_report
from llava_jax.evaluation.report import HALLUCINATION, comparison, hallucination_table, table

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "the benchmark: a file of configs/eval", lock_config=True
)
CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "a run of train.py, one step of it, a Hugging Face folder or a hub name"
)
TEMPLATE = flags.DEFINE_string(
    "template", None, "conversation template around each question (default: the checkpoint's own)"
)
QUANTIZE = flags.DEFINE_enum(
    "quantize",
    None,
    ["int8", "int4"],
    "eight or four bits for each weight of the language model (default: off)",
)
KV_CACHE = flags.DEFINE_enum(
    "kv_cache", None, ["int8"], "eight bits for each key and value (default: off)"
)
LOOKUP = flags.DEFINE_integer(
    "lookup", 0, "guess so many tokens at a time where answers repeat prompts (default: off)"
)
REPLICAS = flags.DEFINE_integer(
    "replicas", None, "copies of the model that share the questions (default: all devices)"
)
OUTPUT = flags.DEFINE_string(
    "output", None, "the folder of all results (default: eval in the checkpoint's folder)"
)
OVERWRITE = flags.DEFINE_bool("overwrite", False, "drop the answers of another run in --output")
LIMIT = flags.DEFINE_integer("limit", None, "ask only the first N questions of each benchmark")
SHARD = flags.DEFINE_string("shard", None, "i/n: answer only the i-th of n parts, i from 1")


def main() -> None:
    logging.set_verbosity(logging.WARNING)  # Orbax logs a lot at INFO
    # 1. Check: every mistake in the command line or in the files shows before the model is loaded.
    command.check_config(CONFIG.value, base)
    shard = Shard.parse(SHARD.value) if SHARD.value else None
    benchmarks = load_configured(CONFIG.value, LIMIT.value, shard)
    # 2. Load. JAX is imported only now: that takes seconds.
    from llava_jax.evaluation.runner import answer_settings, default_output

    for config, _ in benchmarks:
        answer_settings(config.max_new_tokens, sampling_of(config), config.min_yes)  # raises
    model = load_model(CONFIG.value)
    root = Path(OUTPUT.value or default_output(CHECKPOINT.value))
    # 3. Run.
    for config, benchmark in benchmarks:
        run(model, config, benchmark, root, shard)
    if shard:
        return
    families = {benchmark.name.partition("/")[0] for _, benchmark in benchmarks}
    if families & set(HALLUCINATION):
        print(hallucination_table(root))
    print(f"report: {write_report(root)}")


def load_model(config: ConfigDict):
    """The model on the devices of `config.mesh`, or in --replicas copies."""
    import jax

    from llava_jax.inference.model import Llava
    from llava_jax.parallel.mesh import make_mesh
    from llava_jax.serving.command_line import keep_compilations

    keep_compilations()
    shape, devices = config.mesh.to_dict(), jax.devices()
    if REPLICAS.value is not None:
        shape["data"] = REPLICAS.value
        devices = devices[: max(1, math.prod(shape.values()))]
    mesh = make_mesh(**shape, devices=devices)
    return Llava.from_pretrained(
        CHECKPOINT.value,
        dtype=config.dtype,
        template=TEMPLATE.value,
        quantize=QUANTIZE.value,
        kv_cache=KV_CACHE.value,
        lookup=LOOKUP.value,
        mesh=mesh if mesh.size > 1 else None,
    )


def sampling_of(config: ConfigDict) -> dict:
    """The sampling parameters that differ from the defaults."""
    default = base.get_config().sampling
    return {name: value for name, value in config.sampling.items() if value != default[name]}


def run(model, config: ConfigDict, benchmark: Benchmark, root: Path, shard: Shard | None) -> None:
    """Asks one benchmark and prints its scores."""
    from llava_jax.evaluation.runner import evaluate

    output = root / benchmark.name
    scores = evaluate(
        model,
        benchmark,
        output,
        config.max_new_tokens,
        config.batch_size,
        overwrite=OVERWRITE.value,
        shard=shard,
        settings={"kv_cache": KV_CACHE.value, "template_given": TEMPLATE.value},
        sampling=sampling_of(config),
        min_yes=config.min_yes,
    )
    if shard:
        print(f"answers: {output / shard.folder}; run without --shard to collect all parts")
        return
    if scores:
        print(table(scores))
    print(comparison(benchmark.name, scores))
    print(f"answers: {output / 'predictions.jsonl'}")


if __name__ == "__main__":
    command.run(main, required=("config", "checkpoint"), base=base)
