"""Our step of preference tuning against one with two separate models: same pairs, one run.

    python -m bench.dpo_step --config=configs/easy_vqa_dpo.py --config.model.preset=quickstart

The other side is what trainers of text models do with pictures: each answer stands in a segment of
its own with its picture and question, and a whole second model, with an encoder of its own, is the
reference. Modules, loss and optimizer are ours on both sides, parameters and batches random in the
shapes of the recipe. The sides take turns; printed are pairs a second of CPU time, median over the
turns, and the bytes that each compiled step needs.
"""

import dataclasses
import json
import statistics
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from bench.train_step import BLOCKS, CONFIG, STEPS, one_device
from configs import base
from llava_jax import command
from llava_jax.data.rows import RowFormat, pack
from llava_jax.models.decoder import output_embedding
from llava_jax.models.llava import LlavaModel, abstract_params, init_params
from llava_jax.models.lora import abstract_lora, init_lora
from llava_jax.text.templates import PAIR
from llava_jax.text.tokenization import IGNORE_INDEX, TokenRow
from llava_jax.training.losses import answer_log_probs
from llava_jax.training.preferences import dpo_loss
from llava_jax.training.state import fresh_state, place
from llava_jax.training.step import (
    REFERENCE,
    TrainState,
    batch_targets,
    make_train_step,
    model_inputs,
)

PAIRS = flags.DEFINE_integer("pairs", 2, "Pairs a row.")
PROMPT = flags.DEFINE_integer("prompt", 40, "Tokens of a prompt besides its picture.")
ANSWER = flags.DEFINE_integer("answer", 24, "Tokens of an answer.")


@dataclasses.dataclass(frozen=True)
class SeparateModels:
    """DPO of pairs whose answers are segments 2n - 1 and 2n, as a `training.step.Loss`."""

    model: LlavaModel
    chunk: int
    beta: float
    pairs: int  # of a row
    figures = ()

    def units(self, batch):
        return jnp.max(batch["segment_ids"], axis=1) // 2

    def __call__(self, params, frozen, batch, weights):
        pairs = [self.log_probs(p, batch) for p in (params, frozen[REFERENCE])]
        losses, _ = dpo_loss(*pairs, self.beta)
        return jnp.sum(weights[:, None] * losses), {}

    def log_probs(self, params, batch):
        inputs, more = model_inputs(batch)
        hidden = self.model.apply({"params": params}, *inputs, **more)
        table, targets = output_embedding(params["decoder"]), batch_targets(batch)
        answers, count = batch["segment_ids"] - 1, 2 * self.pairs
        sums = answer_log_probs(hidden, table, targets, answers, count, self.chunk)
        return sums.reshape(len(sums), -1, 2)


@dataclasses.dataclass
class Side:
    """A compiled step, what it is run on, and the bytes that it needs."""

    step: jax.stages.Compiled
    state: TrainState
    frozen: dict
    batch: dict
    needed: int


def batch_of(row_format: RowFormat, rows: int, vocabulary: int, sizes: tuple) -> dict:
    """Rows of random pairs: one segment a pair, or each answer in one of its own.

    Args:
      sizes: pairs a row, tokens of a prompt besides its picture, tokens of an answer.
    """
    (pairs, prompt_length, answer_length), together = sizes, row_format.turns == PAIR
    rng, count = np.random.default_rng(0), row_format.tokens_per_tile
    side = row_format.image.size
    (layout,) = row_format.layouts([(side, side)])
    packed = []
    for _ in range(rows):
        segments, pictures = [], []
        for _ in range(pairs):
            pixels = rng.integers(0, 256, (layout.tiles, side, side, 3), np.uint8)
            prompt = rng.integers(0, vocabulary, count + prompt_length)
            prompt[:count] = row_format.image_token_id
            # The last token of the prompt is each answer's own: it predicts the first of it.
            ends = rng.integers(0, vocabulary, (2, answer_length))
            tails = [np.concatenate([prompt[-1:], answer]) for answer in ends]
            for own in [tails] if together else [tails[:1], tails[1:]]:
                segments.append(_segment([prompt[:-1], *own], count))
                pictures.append((layout, pixels))
        packed.append(pack(segments, pictures, row_format))
    return {name: jnp.asarray(np.stack([row[name] for row in packed])) for name in packed[0]}


def _segment(parts: list[np.ndarray], picture: int) -> TokenRow:
    """A prompt, whose first tokens are a picture's, then answers, learnt but for a token."""
    ids = np.concatenate(parts).astype(np.int32)
    turns = np.concatenate([np.full(len(part), turn) for turn, part in enumerate(parts)])
    places = np.concatenate([np.arange(len(part)) for part in parts])
    labels = np.where((turns > 0) & (places > 0), ids, IGNORE_INDEX).astype(np.int32)
    turn_ids = turns.astype(np.int32) if len(parts) > 2 else None
    return TokenRow(ids, labels, ((0, picture),), np.zeros((len(ids), 2), np.int64), turn_ids)


def compiled_sides(config: ConfigDict, pairs: int, prompt: int, answer: int) -> dict[str, Side]:
    """Both steps, compiled, with random parameters and the same pairs."""
    stage = one_device(config)
    shape, optimizer = stage.model.config, stage.optimizer(lambda step: 1.0)
    params = jax.jit(lambda: nn.meta.unbox(init_params(shape, jax.random.key(0))))()
    start = params
    if stage.lora:
        boxed = abstract_lora(stage.lora, abstract_params(shape))
        start = params | {"lora": init_lora(boxed, jax.random.key(1))}
    sides = {}
    for name, together in (("llava_jax", True), ("separate", False)):
        answers, copies = (2 * answer + 1, 1) if together else (answer, 2)
        length = pairs * copies * (shape.tokens_per_tile + prompt + answers)
        row_format = dataclasses.replace(
            stage.row_format,
            max_length=length,
            row_length=length,
            tiles=pairs * copies,
            turns=stage.row_format.turns if together else "conversation",
        )
        vocabulary = shape.decoder.vocab_size - 1
        batch = batch_of(row_format, config.batch_size, vocabulary, (pairs, prompt, answer))
        state, frozen = fresh_state(stage.state, start, optimizer), place(start, stage.frozen)
        loss = stage.loss
        if not together:
            whole = jax.tree.map(lambda x: jnp.array(x, stage.model.dtype), params)
            frozen = frozen | {REFERENCE: whole}
            loss = SeparateModels(stage.model, config.loss_chunk, config.dpo.beta, pairs)
        with stage.scope():
            step = jax.jit(make_train_step(loss, optimizer, 1, stage.join), donate_argnums=0)
            step = step.lower(state, frozen, batch).compile()
        memory = step.memory_analysis()
        needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        sides[name] = Side(step, state, frozen, batch, needed)
    return sides


def run(side: Side, steps: int) -> list[float]:
    """Takes steps; gives their losses."""
    losses = []
    for _ in range(steps):
        side.state, metrics = side.step(side.state, side.frozen, side.batch)
        losses.append(float(metrics["loss"]))
    return losses


def main() -> None:
    config, pairs = CONFIG.value, PAIRS.value
    sides = compiled_sides(config, pairs, PROMPT.value, ANSWER.value)
    first = {name: run(side, 2) for name, side in sides.items()}  # these are slower, too
    speeds = {name: [] for name in sides}
    for _ in range(BLOCKS.value):
        for name, side in sides.items():
            began = time.process_time()
            run(side, STEPS.value)
            spent = time.process_time() - began
            speeds[name].append(STEPS.value * config.batch_size * pairs / spent)
    print(f"{'':10} {'pairs/CPU s':>12} {'GB':>6}  first losses")
    for name, found in speeds.items():
        shown = ", ".join(f"{loss:.5f}" for loss in first[name])
        print(
            f"{name:10} {statistics.median(found):12.3f} {sides[name].needed / 1e9:6.2f}  {shown}"
        )
    ratios = [a / b for a, b in zip(*speeds.values(), strict=True)]
    memory = sides["llava_jax"].needed / sides["separate"].needed
    ratio = statistics.median(ratios)
    print(f"speed ratio {ratio:.2f} (median over turns), memory ratio {memory:.2f}")
    print(json.dumps({"speed_ratio": ratio, "memory_ratio": memory, "ratios": ratios}))


if __name__ == "__main__":
    command.run(main, base=base)
