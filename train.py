"""Trains one stage of a LLaVA: python train.py --config=configs/NAME.py [--config.key=value ...]

A stage is what trains at which rate, on what data, for how long; configs/base.py lists every
option. The run lives in config.workdir; started again, it continues from its newest checkpoint.
"""

import contextlib
import itertools
import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from configs import base
from llava_jax import command, imports
from llava_jax.data.pipeline import TrainingData
from llava_jax.data.records import about
from llava_jax.errors import LlavaError
from llava_jax.files import locked, write_json
from llava_jax.parallel import hosts
from llava_jax.text.tokenizer import load_tokenizer
from llava_jax.training import config_values, recipe
from llava_jax.training.preemption import sigterm_noted
from llava_jax.training.stage import Stage
from llava_jax.weights.read.fields import read_json
from llava_jax.weights.run_directory import check_sources, latest_step, write_run_model

CONFIG = config_flags.DEFINE_config_file("config", None, "The stage to train.", lock_config=True)
DRY_RUN = flags.DEFINE_string(
    "dry_run",
    None,
    "Compile the step for a topology such as v5e:4x4, h100:8 or cpu:8; report its cost.",
)
FIT = flags.DEFINE_bool("fit", False, "With --dry_run: find the fastest settings that fit.")


def run(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> None:
    """Trains a stage to its end, or until SIGTERM asks it to save and stop.

    Args:
      config: a recipe, with the keys of configs/base.py.
      devices: None for all.

    Raises:
      LlavaError: anything that the user can fix, nearly always before the first step.
    """
    # 1. Check: whatever can be wrong is found before a weight is read.
    values = json.loads(config.to_json_best_effort())
    hosts.check_same(hosts.this_code(__file__) | config_values.flatten(values, "config."))
    command.check_config(config, base)
    stage = Stage.of(config, devices)
    sources = recipe.starting_sources(config)
    tokenizer_dir = recipe.tokenizer_folder(config)
    tokenizer = load_tokenizer(tokenizer_dir, stage.model.config.decoder.vocab_size)
    workdir = Path(config.workdir)
    with contextlib.ExitStack() as lock:
        hosts.first_alone(lambda: lock.enter_context(locked_workdir(workdir)))
        data, held_out = open_data(stage, tokenizer)
        values["data_fingerprint"] = data.fingerprint
        if stage.compares:
            values["reference"] = stage.reference_checksums(sources)
        hosts.first_alone(lambda: claim_workdir(workdir, values))

        # 2. Build: the state, fresh or resumed, and the frozen parameters, on the devices.
        # Late: these import for seconds, which no mistake found above should cost.
        from llava_jax.training.checkpoint import Checkpoints
        from llava_jax.training.features import train_from_features
        from llava_jax.training.loop import Loop
        from llava_jax.training.metrics import open_log
        from llava_jax.training.validation import Validation

        checkpoints = Checkpoints(workdir, config.keep)
        schedule = stage.schedule(data.steps)
        optimizer = stage.optimizer(schedule)
        resumed = checkpoints.restore_newest(stage.state)
        if resumed and int(resumed.step) == data.steps:
            return finish(workdir, data.steps, data.steps)
        model = stage.run_model(sources)
        if resumed:
            check_sources(workdir, model)
        if hosts.is_first():
            write_run_model(workdir, model)
            copy_tokenizer(tokenizer_dir, workdir / "tokenizer")
        state, frozen = stage.starting_state(sources, optimizer, resumed)
        if resumed:
            hosts.report(f"resuming from step {int(state.step)}")
        if stage.from_features:
            with stage.scope():
                train_from_features(stage, frozen, [data, held_out] if held_out else [data])
        of_steps = stage.of_steps(frozen)
        frozen = frozen if held_out else of_steps  # held-out samples are answered by all of it

        # 3. Run.
        batches = data.batch_iterator(int(state.step), *stage.part)
        with stage.scope(), sigterm_noted() as stop, contextlib.closing(batches):
            hosts.report(stage.description(state, frozen, data.steps))
            first = next(batches)
            began, arrays = time.perf_counter(), stage.put(first.arrays)
            train_step = stage.compile_step(optimizer, state, of_steps, arrays)
            seconds = time.perf_counter() - began
            hosts.report(f"compiled in {seconds:.0f} s; {stage.microbatches} microbatches a step")
            log = open_log(stage.config, int(state.step))
            loop = Loop(
                stage=stage,
                train_step=lambda state, batch: train_step(state, of_steps, batch),
                schedule=schedule,
                validate=held_out and Validation(stage, held_out, tokenizer, frozen, log),
                stop=stop,
                log=log,
                checkpoints=checkpoints,
            )
            state = loop.run(state, itertools.chain([first], batches), data.steps)
            checkpoints.close()
            log.close()
        finish(workdir, int(state.step), data.steps)


@contextlib.contextmanager
def locked_workdir(workdir: Path) -> Iterator[None]:
    """Makes the run directory and keeps other runs out of it.

    Raises:
      LlavaError: it cannot be written, or another train.py runs there.
    """
    busy = f"another train.py is running in {workdir}: wait or stop it"
    with contextlib.ExitStack() as stack:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(workdir / ".lock", busy))
        except OSError as error:
            fault = f"config.workdir {workdir} cannot be written: {error.strerror}"
            raise LlavaError(fault) from None
        yield


def open_data(stage: Stage, tokenizer) -> tuple[TrainingData, TrainingData | None]:
    """Training data and held-out data, every record checked.

    All processes measure them, and share in their cache folder what is measured, if it is one.
    """
    data = hosts.together(lambda: stage.training_data(tokenizer))
    hosts.report(f"{stage.config.data.train}: {data.describe()}")
    for line in about(data.records):
        hosts.report(f"  {line}")
    hosts.check_same({"the training data": data.fingerprint})
    stage.check_reach(data, hosts.report)
    held_out = hosts.together(lambda: stage.held_out_data(tokenizer))
    if held_out:
        hosts.report(f"{stage.config.data.validation}: {held_out.describe()}")
    return data, held_out


def claim_workdir(workdir: Path, recipe_now: dict) -> None:
    """Makes the run directory this recipe's; LlavaError if it has checkpoints of another."""
    path = workdir / "config.json"
    if path.exists() and latest_step(workdir) is not None:
        defaults = json.loads(base.get_config().to_json_best_effort())
        before = config_values.with_later_options(read_json(path), defaults, base.FREE)
        changed = config_values.differences(before, recipe_now)
        if changed:
            raise LlavaError(
                f"{workdir} holds the run of another recipe ({'; '.join(changed)}): choose "
                "another config.workdir, go back to that recipe, or delete the folder"
            )
    write_json(path, recipe_now)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies everything besides the weights, so that the run directory can be used by itself."""
    weights = shutil.ignore_patterns("*.safetensors", "*.bin", "*.pth", "*.index.json", ".*")
    if source.resolve() != target.resolve():
        shutil.copytree(source, target, dirs_exist_ok=True, ignore=weights)


def finish(workdir: Path, done: int, steps: int) -> None:
    """Plots the losses and says where things are."""
    if not hosts.is_first():
        return
    if done < steps:
        print(f"{workdir}: stopped by SIGTERM; step {done} of {steps} is saved, start it again")
        return
    from llava_jax.training.metrics import last_losses, plot_losses

    log, plot = workdir / "metrics.jsonl", workdir / "loss.png"
    plot_losses(log, plot)
    print(f"{workdir}: {steps} steps done, {last_losses(log)}; plot in {plot}")
    print(f"ask it: llava-jax chat --checkpoint {workdir} --image FILE")


def main() -> None:
    logging.set_verbosity(logging.WARNING)  # Orbax and JAX log much at INFO
    config = CONFIG.value
    command.check_config(config, base)
    imports.tokenizers_alone()
    if DRY_RUN.value:
        from llava_jax.dry_run import run as dry_run

        sys.exit(dry_run.run(config, DRY_RUN.value, FIT.value))
    hosts.start()
    # On CPU what was compiled for one machine may not run on another.
    if jax.default_backend() != "cpu" and not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", f"{config.workdir}/cache/compiled")
    run(config)


if __name__ == "__main__":
    command.run(main, base=base)
