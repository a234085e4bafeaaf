"""Scores a checkpoint on a benchmark, or on a suite of them.

    python eval.py --config=configs/eval/easy_vqa.py --checkpoint=runs/llava

Writes answers, scores and a page of failures below --output, and there report.md over all
benchmarks. If it is interrupted, the same command continues. Started on every host of a pod, the
hosts share the questions and the first scores. --shard=i/n answers one of n parts on machines that
are not connected; the command without --shard then collects the answers and scores.
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from configs.eval import base
from llava_jax import command
from llava_jax.evaluation import Benchmark, load_configured, write_report
from llava_jax.evaluation.benchmark import Score
from llava_jax.evaluation.report import HALLUCINATION, comparison, hallucination_table, table
from llava_jax.parallel.shares import Meeting, Shard

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
    "replicas",
    None,
    "copies of the model that share the questions (default: all devices of a host)",
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
    from llava_jax.parallel import hosts

    for config, _ in benchmarks:
        answer_settings(config.max_new_tokens, sampling_of(config), config.min_yes)  # raises
    root = Path(OUTPUT.value or default_output(CHECKPOINT.value))
    with hosts.meeting(root / "hosts", __file__, alone=bool(shard)) as meeting:
        model = load_model(CONFIG.value)
        # 3. Run.
        if meeting.place:
            answer_share(model, benchmarks, root, meeting)
            if not meeting.is_first:
                return
        overwrite = OVERWRITE.value and not meeting.place
        for config, benchmark in benchmarks:
            scores = run(model, config, benchmark, root, shard, overwrite)
            show(benchmark, scores, root / benchmark.name, shard)
    if shard:
        return
    families = {benchmark.name.partition("/")[0] for _, benchmark in benchmarks}
    if families & set(HALLUCINATION):
        print(hallucination_table(root))
    print(f"report: {write_report(root)}")


def load_model(config: ConfigDict):
    """The model on the devices of `config.mesh`, or in --replicas copies."""
    from llava_jax.inference.model import Llava
    from llava_jax.serving.command_line import keep_compilations, mesh_here, needs_room

    keep_compilations()
    shape, count = config.mesh.to_dict(), None
    if REPLICAS.value is not None:
        shape["data"] = REPLICAS.value
        count = max(1, math.prod(shape.values()))
    mesh = mesh_here(**shape, count=count)
    with needs_room():
        return Llava.from_pretrained(
            CHECKPOINT.value,
            dtype=config.dtype,
            template=TEMPLATE.value,
            quantize=QUANTIZE.value,
            kv_cache=KV_CACHE.value,
            lookup=LOOKUP.value,
            mesh=mesh,
        )


def answer_share(
    model, benchmarks: Sequence[tuple[ConfigDict, Benchmark]], root: Path, meeting: Meeting
) -> None:
    """Asks this host's share of each benchmark; the first host then waits for the others.

    LlavaError on the first host: others are lost, and with them answers.
    """
    from llava_jax.evaluation.runner import drop_answers, unanswered

    folders = [(benchmark, root / benchmark.name) for _, benchmark in benchmarks]
    meeting.first_alone(lambda: [drop_answers(f) for _, f in folders if OVERWRITE.value])
    for config, benchmark in benchmarks:
        line = meeting.place.describe(len(benchmark.questions), f"questions of {benchmark.name}")
        print(line, file=sys.stderr)
        run(model, config, benchmark, root, meeting.place, quiet=not meeting.is_first)
    if meeting.is_first:
        meeting.collect(
            lambda: [
                f"{count} of {len(benchmark.questions)} questions of {benchmark.name}"
                for benchmark, folder in folders
                if (count := unanswered(benchmark, folder))
            ]
        )


def sampling_of(config: ConfigDict) -> dict:
    """The sampling parameters that differ from the defaults."""
    default = base.get_config().sampling
    return {name: value for name, value in config.sampling.items() if value != default[name]}


def run(
    model,
    config: ConfigDict,
    benchmark: Benchmark,
    root: Path,
    shard: Shard | None,
    overwrite: bool = False,
    quiet: bool = False,
) -> list[Score]:
    """Asks one benchmark, or a part of it, and returns its scores."""
    from llava_jax.evaluation.runner import evaluate

    return evaluate(
        model,
        benchmark,
        root / benchmark.name,
        config.max_new_tokens,
        config.batch_size,
        overwrite=overwrite,
        shard=shard,
        settings={"kv_cache": KV_CACHE.value, "template_given": TEMPLATE.value},
        sampling=sampling_of(config),
        min_yes=config.min_yes,
        quiet=quiet,
    )


def show(benchmark: Benchmark, scores: list[Score], folder: Path, shard: Shard | None) -> None:
    """Prints the scores and where the answers are."""
    if shard:
        print(f"answers: {folder / shard.folder}; run without --shard to collect all parts")
        return
    if scores:
        print(table(scores))
    print(comparison(benchmark.name, scores))
    print(f"answers: {folder / 'predictions.jsonl'}")


if __name__ == "__main__":
    command.run(main, required=("config", "checkpoint"), base=base)
