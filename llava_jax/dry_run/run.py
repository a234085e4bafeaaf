"""`train.py --dry_run`: the cost of a stage on devices that are not attached."""

import itertools
import json

import numpy as np
from ml_collections import ConfigDict

from llava_jax.data.pipeline import TrainingData
from llava_jax.data.records import about
from llava_jax.data.shards import is_there
from llava_jax.dry_run.chips import GIB
from llava_jax.dry_run.compiling import compile_stage
from llava_jax.dry_run.fit import fastest_fit
from llava_jax.dry_run.report import DOES_NOT_FIT, print_report, report
from llava_jax.dry_run.topology import Topology, topology
from llava_jax.text.tokenizer import load_tokenizer
from llava_jax.training import recipe
from llava_jax.training.stage import Stage


def run(config: ConfigDict, name: str, fit: bool) -> int:
    """Prints the dry run of a config; the last line is all of it as one JSON object.

    Args:
      name: of the topology.
      fit: try other settings until the fastest that fits is found.

    Returns:
      The exit status: 0, or DOES_NOT_FIT.
    """
    where = topology(name)
    data = sample = None
    stage = Stage.of(config, where.devices)
    if missing := missing_paths(config):
        print(f"not here, so the contents of rows are assumed: {', '.join(missing)}")
    else:
        data, sample = first_row(stage)
        print(sample)
    figures = report(stage, where, compile_stage(stage), data.fill if data else None)
    print_report(figures)
    if fit:
        figures["fit"] = find_fit(config, where)
    figures["first_row"] = sample
    print(json.dumps(figures))
    return 0 if figures["fits"] else DOES_NOT_FIT


def find_fit(config: ConfigDict, where: Topology) -> dict:
    """The fastest remat policy, microbatch size and mesh that fit, printed as it goes."""

    def try_out(policy: str, accumulation: int, data: int) -> dict:
        changed = ConfigDict(config.to_dict())
        changed.model.remat_policy, changed.accumulation = policy, accumulation
        changed.mesh.data, changed.mesh.fsdp = data, -1
        stage = Stage.of(changed, where.devices)
        return report(stage, where, compile_stage(stage))

    def show(entry: dict) -> None:
        seconds = entry["step_seconds"]
        verdict = f"fits, {seconds:.3f} s a step if nothing hides" if seconds else "fits"
        print(
            f"{as_flags(entry)}: {entry['needed'] / GIB:.2f} GiB, "
            f"{verdict if entry['fits'] else 'does not fit'}",
            flush=True,
        )

    mesh = Stage.of(config, where.devices).mesh.shape
    found = fastest_fit(config.batch_size, mesh, try_out, show)
    print(
        f"fastest that fits: {as_flags(found['best'])}"
        if found["best"]
        else "nothing fits: take more chips, or --config.optimizer.moments_dtype=bfloat16"
    )
    return found


def as_flags(entry: dict) -> str:
    """The settings of `fastest_fit` as train.py takes them."""
    return (
        f"--config.model.remat_policy={entry['remat_policy']} "
        f"--config.accumulation={entry['accumulation']} "
        f"--config.mesh.data={entry['data']} --config.mesh.fsdp=-1"
    )


def missing_paths(config: ConfigDict) -> list[str]:
    """The paths of data and tokenizer that are not on this machine."""
    tokenizer = config.init.tokenizer or config.init.checkpoint or config.init.decoder
    paths = {"data.train": config.data.train, "the tokenizer's folder": tokenizer}
    return [f"{key} ({path})" for key, path in paths.items() if not is_there(path)]


def first_row(stage: Stage) -> tuple[TrainingData, str]:
    """The training data, and the first packed row of the first step as text."""
    tokenizer = load_tokenizer(recipe.tokenizer_folder(stage.config))
    data = stage.training_data(tokenizer)
    print("\n  ".join([f"{stage.config.data.train}: {data.describe()}", *about(data.records)]))
    stage.check_reach(data, print)
    batch = next(data.batch_iterator(0, 0, stage.config.batch_size))
    row = {name: batch.arrays[name][0] for name in ("input_ids", "labels", "segment_ids")}
    return data, row_text(row, tokenizer, stage.model.config.image_token_id)


def row_text(row: dict[str, np.ndarray], tokenizer, image_token_id: int) -> str:
    """A packed row as text: one line a segment, with the learnt tokens between « and ».

    Args:
      row: input_ids, labels and segment_ids, int[T].
    """
    kinds = np.stack([row["segment_ids"], row["labels"] >= 0, row["input_ids"] == image_token_id])
    places = itertools.groupby(range(kinds.shape[1]), key=lambda i: tuple(kinds[:, i].tolist()))
    lines: dict[int, str] = {}
    for (segment, learnt, image), run_of in places:
        ids = row["input_ids"][list(run_of)]
        text = f"<image x {len(ids)}>" if image else tokenizer.decode(ids)
        lines[segment] = lines.get(segment, "") + (f"«{text}»" if learnt else text)
    padding = int(np.sum(row["segment_ids"] == 0))
    texts = [f"segment {segment}: {text}" for segment, text in lines.items() if segment]
    return "\n".join(["first row of the first step:", *texts, f"padding: {padding} tokens"])
