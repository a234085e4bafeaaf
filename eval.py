"""Scores a checkpoint on a benchmark.

    python eval.py --config=configs/eval/easy_vqa.py --checkpoint=runs/llava

Writes predictions.jsonl and metrics.json below --output and prints the scores. Interrupted, the
same command continues.
"""

from pathlib import Path

from absl import flags, logging
from ml_collections import config_flags

from llava_jax import command
from llava_jax.errors import LlavaError

CONFIG = config_flags.DEFINE_config_file("config", None, "the benchmark", lock_config=True)
CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "work directory of train.py, one step of it, or a Hugging Face folder"
)
OUTPUT = flags.DEFINE_string("output", None, "folder of the results; default: below CHECKPOINT")
OVERWRITE = flags.DEFINE_bool("overwrite", False, "drop the answers of another run in OUTPUT")


def main() -> None:
    # Late: loading JAX takes seconds that a mistyped flag should not cost.
    from llava_jax.evaluation import BENCHMARKS, evaluate, table
    from llava_jax.inference.model import Llava

    logging.set_verbosity(logging.WARNING)  # Orbax tells much at INFO
    config = CONFIG.value
    if config.benchmark not in BENCHMARKS:
        raise LlavaError(
            f"unknown benchmark {config.benchmark!r}: choose one of {', '.join(BENCHMARKS)}"
        )
    benchmark = BENCHMARKS[config.benchmark](config.data, config.image_root or None)
    model = Llava.from_pretrained(CHECKPOINT.value, dtype=config.dtype)
    output = Path(OUTPUT.value or default_output(Path(CHECKPOINT.value), benchmark.name))
    scores = evaluate(
        model, benchmark, output, config.max_new_tokens, config.batch_size, OVERWRITE.value
    )
    print(table(scores))
    print(f"answers: {output / 'predictions.jsonl'}")


def default_output(checkpoint: Path, benchmark: str) -> Path:
    """eval/BENCHMARK in the work directory of the checkpoint, of which it may be one step."""
    is_step = checkpoint.parent.name == "checkpoints"
    return (checkpoint.parent.parent if is_step else checkpoint) / "eval" / benchmark


if __name__ == "__main__":
    command.run(main, required=("config", "checkpoint"))
