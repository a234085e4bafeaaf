"""Trains one stage of a LLaVA: python train.py --config=configs/NAME.py [--config.key=value ...]

Stage = what trains at which rate + on what data + for how long; configs/base.py lists every option.
The run lives in config.workdir; started again, it goes on where its newest checkpoint left off.
"""

import contextlib
import functools
import itertools
import json
import shutil
import sys
import time
from pathlib import Path

import flax.linen as nn
import jax
from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from llava_jax import command
from llava_jax.data.pipeline import TrainingData
from llava_jax.data.records import open_records
from llava_jax.dry_run import run as dry_run
from llava_jax.errors import LlavaError
from llava_jax.files import locked, write_json
from llava_jax.inference.model import Llava
from llava_jax.models.llava import LlavaConfig
from llava_jax.models.precision import compute_precision
from llava_jax.parallel import hosts
from llava_jax.parallel.mesh import make_mesh, microbatches
from llava_jax.parallel.sharding import (
    RULES,
    process_part,
    put_batch,
)
from llava_jax.text.tokenizer import load_tokenizer
from llava_jax.training import recipe
from llava_jax.training.checkpoint import Checkpoints
from llava_jax.training.flops import mfu
from llava_jax.training.loop import Loop
from llava_jax.training.metrics import MetricsLog, NoLog, plot_losses, read_log
from llava_jax.training.optimizer import (
    adamw,
    warmup_cosine,
)
from llava_jax.training.preemption import sigterm_noted
from llava_jax.training.state import (
    abstract_model,
    abstract_state,
    fresh_state,
    joined,
    place,
)
from llava_jax.training.step import compile_step, make_eval_step
from llava_jax.training.validation import Validation
from llava_jax.weights.read.fields import read_json
from llava_jax.weights.run_directory import RunModel, latest_step, write_run_model

CONFIG = config_flags.DEFINE_config_file("config", None, "The stage to train.", lock_config=True)
DRY_RUN = flags.DEFINE_string(
    "dry_run", None, "Compile the step for a topology such as v5e:4x4 or cpu:8 and tell its cost."
)
FIT = flags.DEFINE_bool("fit", False, "With --dry_run: find the fastest settings that fit.")


def open_data(config: ConfigDict, model_config: LlavaConfig, tokenizer) -> tuple:
    """Training data, and held-out data or None; every record is checked here."""
    data = config.data
    row_format = recipe.row_format(config, model_config)
    common = {
        "seed": config.seed,
        "bad_image": data.bad_image,
        "bad_image_ceiling": data.bad_image_ceiling,
        "workers": data.workers,
        "cache_dir": Path(config.workdir) / "cache",
    }

    def build(path: str, split: str | None, **length) -> TrainingData:
        holds_images = Path(path).is_dir()  # a data set of `llava-jax build`
        records = open_records(path, None if holds_images else data.image_root or None, split)
        built = TrainingData(records, tokenizer, row_format, **common, **length)
        hosts.tell(f"{path}: {built.describe()}")
        return built

    length = {"epochs": config.epochs, "steps": config.steps}
    train = build(data.train, data.train_split, batch_size=config.batch_size, **length)
    if not data.validation:
        return train, None
    rows = config.batch_size // config.accumulation
    held_out = {"batch_size": rows, "epochs": 1, "pad_final_batch": True}
    return train, build(data.validation, data.validation_split, **held_out)


@contextlib.contextmanager
def locked_workdir(workdir: Path):
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


def claim_workdir(workdir: Path, recipe_now: dict) -> None:
    """Makes the run directory this recipe's; LlavaError where it has checkpoints of another."""
    path = workdir / "config.json"
    if path.exists() and latest_step(workdir) is not None:
        changed = recipe.differences(read_json(path), recipe_now)
        if changed:
            raise LlavaError(
                f"{workdir} holds the run of another recipe ({'; '.join(changed)}): choose "
                "another config.workdir, go back to that recipe, or delete the folder"
            )
    write_json(path, recipe_now)


def make_state(run_model, sources, seed, optimizer, wanted, resumed) -> tuple:
    """(state, frozen parameters) as `wanted`: what was resumed, or a fresh start.

    Only the components that are needed are read.
    """
    components = set(wanted[1]) | set(() if resumed else wanted[0].params)
    params = recipe.starting_params(run_model.config, run_model.lora, sources, components, seed)
    frozen = place(params, wanted[1])
    if not resumed:
        return fresh_state(wanted[0], params, optimizer), frozen
    hosts.tell(f"resuming from step {int(resumed.step)}")
    return resumed, frozen


def copy_tokenizer(source: Path, target: Path) -> None:
    """Everything beside the weights, so that the run directory can be used by itself."""
    weights = shutil.ignore_patterns("*.safetensors", "*.bin", "*.pth", "*.index.json", ".*")
    if source.resolve() != target.resolve():
        shutil.copytree(source, target, dirs_exist_ok=True, ignore=weights)


def make_validation(
    config, model, held_out, tokenizer, join, frozen, put, part, log
) -> Validation | None:
    """Held-out loss and sample answers, if the config names held-out data."""
    if held_out is None:
        return None
    eval_step = jax.jit(make_eval_step(model, config.loss_chunk, join))
    answerer = Llava(model.config, {}, tokenizer, config.model.template, dtype=config.model.dtype)
    return Validation(
        held_out,
        eval_step=lambda state, batch: eval_step(state.params, frozen, batch),
        put=put,
        part=part,
        answerer=answerer,
        params=lambda state: join(state.params, frozen),
        samples=config.samples,
        sample_tokens=config.sample_tokens,
        log=log,
    )


def run(config: ConfigDict) -> None:
    logging.set_verbosity(logging.WARNING)  # Orbax and JAX tell much at INFO
    # Everything that can be wrong is found here, before a weight is read.
    recipe_now = json.loads(config.to_json_best_effort())
    hosts.check_same(hosts.this_code(__file__) | recipe.flatten(recipe_now, "config."))
    recipe.check_config(config)
    workdir, groups = Path(config.workdir), config.trainable.to_dict()
    model_config = recipe.model_config(config)
    lora = recipe.lora_config(config, model_config)
    sources = recipe.starting_sources(config)
    mesh = make_mesh(**config.mesh)
    config.accumulation = microbatches(mesh, config.batch_size, config.accumulation)
    part = process_part(mesh)
    tokenizer_dir = recipe.tokenizer_folder(config)
    tokenizer = load_tokenizer(tokenizer_dir, model_config.decoder.vocab_size)
    lock = contextlib.ExitStack()
    hosts.first_alone(lambda: lock.enter_context(locked_workdir(workdir)))
    # The first process measures the data; the others find in the cache what it measured.
    build = functools.partial(open_data, config, model_config, tokenizer)
    data, held_out = hosts.first_alone(build) or build()
    hosts.check_same({"the training data": data.fingerprint})
    recipe_now |= {"data_fingerprint": data.fingerprint}
    hosts.first_alone(lambda: claim_workdir(workdir, recipe_now))

    dtype, precision = compute_precision(config.model.dtype)
    schedule = warmup_cosine(data.steps, config.optimizer.warmup_ratio)
    optimizer = adamw(groups, schedule, **recipe.optimizer_options(config))
    wanted = abstract_state(mesh, abstract_model(model_config, lora), groups, optimizer, dtype)
    checkpoints = Checkpoints(workdir, config.keep)
    resumed = checkpoints.restore_newest(wanted[0])
    if resumed and int(resumed.step) == data.steps:
        lock.close()
        return finish(workdir, data.steps, data.steps)
    run_model = RunModel(
        model_config, config.model.template, recipe.frozen_sources(sources, wanted[1]), lora
    )
    if hosts.is_first():
        write_run_model(workdir, run_model)
        copy_tokenizer(tokenizer_dir, workdir / "tokenizer")

    state, frozen = make_state(run_model, sources, config.seed, optimizer, wanted, resumed)
    model, join = recipe.training_model(config, model_config, mesh), joined(lora)
    put = functools.partial(put_batch, mesh)
    with (
        jax.set_mesh(mesh),
        nn.logical_axis_rules(RULES),
        jax.default_matmul_precision(precision),
        sigterm_noted() as stop,
    ):
        done = int(state.step)
        report_start(model_config, mesh, state, frozen, data)
        batches = data.batch_iterator(done, *part)
        first = next(batches)
        began, arrays = time.perf_counter(), put(first.arrays)
        train_step = compile_step(config, model, optimizer, join, state, frozen, arrays)
        seconds = time.perf_counter() - began
        hosts.tell(f"compiled in {seconds:.0f} s; {config.accumulation} microbatches a step")
        log = NoLog()
        if hosts.is_first():
            log = MetricsLog(workdir, done, config.wandb_project, config.to_dict())
        validate = make_validation(config, model, held_out, tokenizer, join, frozen, put, part, log)
        loop = Loop(
            train_step=lambda state, batch: train_step(state, frozen, batch),
            put=put,
            rates=lambda step: {name: rate * schedule(step) for name, rate in groups.items()},
            mfu=functools.partial(mfu, model_config, set(state.params)),
            stop=stop,
            validate=validate,
            log=log,
            checkpoints=checkpoints,
            config=config,
        )
        state = loop.run(state, itertools.chain([first], batches), data.steps)
        checkpoints.close()
        log.close()
    finish(workdir, int(state.step), data.steps)
    lock.close()


def report_start(model_config, mesh, state, frozen, data) -> None:
    """What is about to run, on what: the lines to look at when something is not as expected."""
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree)) / 1e6
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    if jax.process_count() > 1:
        devices += f" of {jax.process_count()} processes"
    hosts.tell(
        f"{devices} as {dict(mesh.shape)}; parameters: {count(state.params):,.1f}M trained "
        f"({', '.join(state.params)}), {count(frozen):,.1f}M frozen; image: "
        f"{model_config.image.size} pixels, {model_config.tokens_per_tile} tokens; "
        f"steps: {int(state.step)} of {data.steps} done"
    )


def finish(workdir: Path, done: int, steps: int) -> None:
    """Plots the losses and says where things are."""
    if not hosts.is_first():
        return
    if done < steps:
        print(
            f"{workdir}: stopped by SIGTERM; step {done} of {steps} is saved, start again to go on"
        )
        return
    plot_losses(workdir / "metrics.jsonl", workdir / "loss.png")
    lines = read_log(workdir / "metrics.jsonl")
    last = {
        name: line[name] for line in lines for name in ("loss", "validation_loss") if name in line
    }
    losses = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in last.items())
    print(f"{workdir}: {steps} steps done, {losses}; plot in {workdir / 'loss.png'}")
    print(f"ask it: llava-jax chat --checkpoint {workdir} --image FILE")


def main() -> None:
    if DRY_RUN.value:
        sys.exit(dry_run.run(CONFIG.value, DRY_RUN.value, FIT.value, open_data))
    hosts.start()
    # On CPU what was compiled for one machine may not run on another.
    if jax.default_backend() != "cpu" and not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", f"{CONFIG.value.workdir}/cache/compiled")
    run(CONFIG.value)


if __name__ == "__main__":
    command.run(main)
