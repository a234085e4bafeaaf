"""The loop over steps: feed, log one step late, validate, save, and stop at a loss gone wrong."""

import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from tqdm import tqdm

from llava_jax.data.pipeline import Batch
from llava_jax.errors import LlavaError
from llava_jax.parallel import hosts
from llava_jax.training.checkpoint import Checkpoints
from llava_jax.training.feed import Feed, Shortage
from llava_jax.training.flops import mfu, step_flops
from llava_jax.training.metrics import MetricsLog, NoLog
from llava_jax.training.stage import Stage
from llava_jax.training.step import TrainState


@dataclasses.dataclass
class Loop:
    """What happens around the steps.

    Attributes:
      stage: its config gives log_every, validate_every and save_every in steps; the last step is
        always logged, validated and saved.
      train_step: compiled (state, batch) -> (state, metrics).
      schedule: step -> share of the peak learning rates, for the log.
      validate: (state, step) -> None; None without held-out data.
      stop: step -> True if the run is to save and end; asked once after every step.
    """

    stage: Stage
    train_step: Callable
    schedule: Callable
    validate: Callable | None
    stop: Callable
    log: MetricsLog | NoLog
    checkpoints: Checkpoints

    def run(self, state: TrainState, batches: Iterator[Batch], steps: int) -> TrainState:
        """Runs until `steps` updates are done, or until `stop` says so.

        The numbers of a step are fetched while the next one computes, so the device never waits
        for the host; only validation and saving wait for the device.

        Raises:
          LlavaError: loss or gradient is not finite. Nothing of that step is saved.
        """
        start = int(state.step)
        bar = tqdm(
            total=steps,
            initial=start,
            desc=Path(self.stage.config.workdir).name,
            unit="step",
            disable=jax.process_index() != 0,
            mininterval=0.5 if sys.stderr.isatty() else 30,
        )
        self._shortage = Shortage(self.stage.config.data.workers)
        # Both are closed before an error is printed.
        with contextlib.closing(Feed(batches)) as feed, bar:
            return self._steps(state, feed, range(start + 1, steps + 1), bar)

    def _steps(self, state: TrainState, feed: Feed, numbers: range, bar: tqdm):
        config = self.stage.config
        self._finished_at, pending, steps = time.perf_counter(), None, numbers.stop - 1
        for step in numbers:
            batch, waited = feed.next()
            state, metrics = self.train_step(state, self.stage.put(batch.arrays))
            feed.computing(metrics)
            if pending:
                self._finish(*pending, steps, bar)
            pending = (step, metrics, batch, waited)
            self.checkpoints.check()
            last = self.stop(step) or step == steps
            validate = self.validate and (step % config.validate_every == 0 or step == steps)
            save = step % config.save_every == 0 or last
            if validate or save:
                self._finish(*pending, steps, bar)
                pending = None
                if validate:
                    self.validate(state, step)
                if save:
                    self.checkpoints.save(state, step)
                self._finished_at = time.perf_counter()  # neither counts as step time
            if last:
                break
        return state

    def _finish(
        self, step: int, metrics: dict, batch: Batch, waited: float, steps: int, bar: tqdm
    ) -> None:
        """Waits for a step, checks it, and logs it if its turn has come."""
        metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
        now = time.perf_counter()
        seconds, self._finished_at = now - self._finished_at, now
        self._check_finite(step, metrics, batch)
        self._shortage.add(seconds, waited)
        bar.set_postfix_str(
            f"loss {metrics['loss']:.3f}, {metrics['tokens'] / seconds:,.0f} tokens/s",
            refresh=False,
        )
        bar.update()
        if batch.skipped:
            tqdm.write(f"step {step}: left out for bad images: {', '.join(batch.skipped)}")
        if step % self.stage.config.log_every == 0 or step in (1, steps):
            self.log.scalars(step, self._scalars(step, metrics, seconds, waited))
            if sentence := self._shortage.sentence():
                hosts.report(f"step {step}: {sentence}")

    def _scalars(self, step: int, metrics: dict, seconds: float, waited: float) -> dict:
        stage = self.stage
        rows, row_format = stage.config.batch_size, stage.row_format
        warm = self.schedule(step - 1)
        scalars = {
            "loss": metrics["loss"],
            **{name: metrics[name] for name in stage.loss.figures},
            "grad_norm": metrics["grad_norm"],
            **{f"learning_rate/{k}": float(rate * warm) for k, rate in stage.groups.items()},
            "tokens": int(metrics["tokens"]),
            "supervised_tokens": int(metrics["supervised_tokens"]),
            "images": int(metrics["images"]),
            "real_token_share": metrics["tokens"] / (rows * row_format.length),
            "real_tile_share": metrics["images"] / max(rows * row_format.tiles, 1),
            "tokens_per_second": metrics["tokens"] / seconds,
            "images_per_second": metrics["images"] / seconds,
            "step_seconds": seconds,
            "data_wait_seconds": waited,
        }
        flops = step_flops(
            stage.model.config,
            stage.trainable,
            metrics,
            stage.compares,
            not stage.from_features,
        )
        share = mfu(flops, seconds, list(stage.mesh.devices.flat))
        return scalars if share is None else scalars | {"mfu": share}

    def _check_finite(self, step: int, metrics: dict, batch: Batch) -> None:
        wrong = [n for n in ("loss", "grad_norm") if not math.isfinite(metrics[n])]
        if not wrong:
            return
        config = self.stage.config
        # One step back: the parameters that this step started from may be what is wrong.
        last_good = self.checkpoints.newest_before(step - 1)
        flags = [f"--config.trainable.{g}={r / 2:g}" for g, r in self.stage.groups.items()]
        if last_good is not None:
            # The checkpoint is the whole model: folders named with it would replace parts of it.
            flags += [f"--config.init.{k}=" for k in ("vision", "decoder") if config.init[k]]
            flags.append(f"--config.init.checkpoint={config.workdir}/checkpoints/{last_good}")
        raise LlavaError(
            f"step {step}: {wrong[0]} is {metrics[wrong[0]]}. Records of the batch: "
            f"{', '.join(batch.record_ids)}. Last good checkpoint: "
            f"{'none' if last_good is None else f'step {last_good}'}. Look at those records with "
            "`llava-jax show`, or start again from there at half the rate, with "
            f"--config.workdir=NEW_FOLDER {' '.join(flags)}; a longer warm-up "
            "(--config.optimizer.warmup_ratio=0.1) or another order (--config.seed=1) may help, too"
        )
