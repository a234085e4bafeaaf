"""Scores a checkpoint on a benchmark.

    python eval.py --config=configs/eval/easy_vqa.py --checkpoint=runs/llava

Writes answers, scores and a page of failures below --output, and report.md over all benchmarks
there. Interrupted, the same command continues. --shard=i/n answers one of n parts, on as many
machines as there are; the command without it then takes their answers together.
"""

from pathlib import Path

from absl import flags, logging
from ml_collections import config_flags

from llava_jax import command
from llava_jax.evaluation import (
    Shard,
    check_images,
    comparison,
    load_benchmark,
    table,
    write_report,
)

CONFIG = config_flags.DEFINE_config_file("config", None, "the benchmark", lock_config=True)
CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "work directory of train.py, one step of it, or a Hugging Face folder"
)
OUTPUT = flags.DEFINE_string("output", None, "folder of all results; default: CHECKPOINT/eval")
OVERWRITE = flags.DEFINE_bool("overwrite", False, "drop the answers of another run in OUTPUT")
LIMIT = flags.DEFINE_integer("limit", None, "ask only the first questions")
SHARD = flags.DEFINE_string("shard", None, "i/n: answer only the i-th of n parts, i from 1")


def main() -> None:
    logging.set_verbosity(logging.WARNING)  # Orbax tells much at INFO
    config = CONFIG.value
    shard = Shard.parse(SHARD.value) if SHARD.value else None
    benchmark = load_benchmark(config.benchmark, config.data_root, config.options.to_dict())
    if LIMIT.value is not None:
        benchmark = benchmark.first(LIMIT.value)
    check_images(shard.of(benchmark.questions) if shard else benchmark.questions, benchmark.source)
    # Late: loading JAX takes seconds that a mistyped flag or a missing file should not cost.
    from llava_jax.evaluation.runner import default_output, evaluate
    from llava_jax.inference.model import Llava
    from llava_jax.serving.command_line import keep_compilations, mesh_of_all

    keep_compilations()
    mesh = mesh_of_all(**config.mesh)
    model = Llava.from_pretrained(CHECKPOINT.value, dtype=config.dtype, mesh=mesh)
    root = Path(OUTPUT.value or default_output(CHECKPOINT.value))
    output = root / benchmark.name
    scores = evaluate(
        model, benchmark, output, config.max_new_tokens, config.batch_size, OVERWRITE.value, shard
    )
    if shard:
        print(f"answers: {output / shard.folder}; without --shard all parts are taken together")
        return
    if scores:
        print(table(scores))
    print(comparison(benchmark.name, scores))
    print(f"answers: {output / 'predictions.jsonl'}\nreport: {write_report(root)}")


if __name__ == "__main__":
    command.run(main, required=("config", "checkpoint"))
