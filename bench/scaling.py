"""How a step's cost grows with chips: a table over TPU topologies from dry runs; no TPU is needed.

python -m bench.scaling --config=configs/llava15_7b_instruct.py --topologies=v5e:4x4,v5e:8x8

Two tables: the global batch of the config on all of them, and as many rows a chip as the first
has. A range is from everything hidden behind the largest term to nothing hidden. A dry run of 7B
takes half a minute to two minutes and 3 GB; needs `pip install -e '.[tpu]'`.
"""

import functools

from absl import flags
from ml_collections import ConfigDict, config_flags

from configs import base
from llava_jax import command
from llava_jax.dry_run.chips import GIB
from llava_jax.dry_run.compiling import compile_stage
from llava_jax.dry_run.report import report
from llava_jax.dry_run.topology import topology
from llava_jax.training.stage import Stage

HEAD = ("topology", "rows", "microbatches", "GiB a chip", "GB into a chip", "compute s")
HEAD += ("memory s", "collectives s", "step s", "MFU", "as compiled")


def line(cells) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def cells(figures: dict) -> list[str]:
    """A row of the table from the report of a dry run; what does not fit says so."""
    needed = f"{figures['bytes']['needed'] / GIB:.2f}" + ("" if figures["fits"] else " (too much)")
    start = [figures["topology"], figures["rows"], figures["microbatches"], needed]
    sent = [f"{figures['collective_bytes'] / 1e9:.1f}"] if "collective_bytes" in figures else []
    if "estimate" not in figures:  # it does not fit, or no speed is assumed (CPU)
        return [*start, *sent, *["-"] * (len(HEAD) - len(start) - len(sent))]
    e = figures["estimate"]
    terms = [f"{e['seconds'][term]:.3f}" for term in ("compute", "memory", "collectives")]
    seconds = f"{e['step_seconds']:.3f} to {e['step_seconds_nothing_hidden']:.3f}"
    mfu = f"{e['mfu']:.0%} to {e['mfu_nothing_hidden']:.0%}"
    return [*start, *sent, *terms, seconds, mfu, f"{e['mfu_as_compiled']:.0%}"]


def print_tables(config: ConfigDict, names: list[str]) -> None:
    """Both tables over topologies, a line as soon as its dry run is done."""
    chips = {name: len(topology(name).devices) for name in names}

    @functools.cache
    def dry_run(name: str, rows: int) -> dict:
        changed = ConfigDict(config.to_dict())
        changed.batch_size = rows
        where = topology(name)
        stage = Stage.of(changed, where.devices)
        return report(stage, where, compile_stage(stage))

    a_chip = max(config.batch_size // chips[names[0]], 1)
    tables = {
        f"{config.batch_size} rows in all": lambda name: config.batch_size,
        f"{a_chip} rows a chip": lambda name: a_chip * chips[name],
    }
    for title, rows in tables.items():
        print(f"\n{title}\n\n{line(HEAD)}\n{line('---' for _ in HEAD)}", flush=True)
        for name in names:
            print(line(cells(dry_run(name, rows(name)))), flush=True)


if __name__ == "__main__":
    config_file = config_flags.DEFINE_config_file("config", None, "The stage.", lock_config=True)
    topologies = flags.DEFINE_list("topologies", None, "Such as v5e:4x4,v5e:8x8, small to large.")
    command.run(
        lambda: print_tables(config_file.value, topologies.value), ("config", "topologies"), base
    )
