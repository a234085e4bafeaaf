"""The jitted training step: loss and gradient of the trainable tree, then one optimizer update."""

import flax
import jax
import jax.numpy as jnp
import optax

from llava_jax.models.decoder import output_embedding
from llava_jax.models.llava import LlavaConfig, LlavaModel, image_token_count
from llava_jax.training.losses import IGNORE_INDEX, cross_entropy_sum, next_token_targets
from llava_jax.training.optimizer import merge_params

MODEL_INPUTS = ("input_ids", "images", "position_ids", "segment_ids")


@flax.struct.dataclass
class TrainState:
    """What a step changes and a checkpoint keeps. Frozen parameters are no part of it."""

    step: jax.Array  # int32, optimizer updates done
    params: dict  # the trainable tree, float32 masters
    opt_state: optax.OptState


def batch_loss(model: LlavaModel, params: dict, batch: dict, chunk: int):
    """(sum of token losses, supervised tokens) of a batch, both float32 scalars."""
    turn_ids = batch.get("turn_ids")
    inputs = [batch[name] for name in MODEL_INPUTS]
    hidden_states, _ = model.apply({"params": params}, *inputs, turn_ids=turn_ids)
    targets = next_token_targets(batch["labels"], batch["segment_ids"], turn_ids)
    table = output_embedding(params["decoder"])
    total = cross_entropy_sum(hidden_states, table, targets, chunk)
    return total, jnp.sum(targets != IGNORE_INDEX).astype(jnp.float32)


def count_work(config: LlavaConfig, batch: dict) -> dict[str, jax.Array]:
    """What a batch really holds, padding left out: for throughput and MFU."""
    real = batch["segment_ids"] != 0
    placeholders = jnp.sum(batch["input_ids"] == config.image_token_id)
    return {
        "tokens": jnp.sum(real),
        "images": placeholders // image_token_count(config),
        # float32: over a pod batch the number of pairs outgrows int32
        "attention_pairs": jnp.sum(
            jnp.where(real, batch["position_ids"] + 1, 0), dtype=jnp.float32
        ),
    }


def make_train_step(model: LlavaModel, optimizer, accumulation: int, chunk: int):
    """A step function (state, frozen, batch) -> (state, metrics), to be jitted.

    The batch is cut into `accumulation` microbatches; loss and gradients are summed over them in
    float32 and divided once by the number of supervised tokens of the whole batch, so the result
    does not depend on how it was cut.
    """

    def loss_and_grads(trainable, frozen, batch):
        def loss(trainable):
            return batch_loss(model, merge_params(trainable, frozen), batch, chunk)

        (total, tokens), grads = jax.value_and_grad(loss, has_aux=True)(trainable)
        return total, tokens, jax.tree.map(lambda g: g.astype(jnp.float32), grads)

    def accumulated(trainable, frozen, batch):
        if accumulation == 1:
            return loss_and_grads(trainable, frozen, batch)

        def add(carry, microbatch):
            return jax.tree.map(jnp.add, carry, loss_and_grads(trainable, frozen, microbatch)), None

        # Strided, so that each microbatch spreads over all devices.
        cut = lambda x: x.reshape(-1, accumulation, *x.shape[1:]).swapaxes(0, 1)
        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), trainable)
        start = (jnp.float32(0), jnp.float32(0), zeros)
        return jax.lax.scan(add, start, jax.tree.map(cut, batch))[0]

    def train_step(state: TrainState, frozen: dict, batch: dict):
        total, tokens, grads = accumulated(state.params, frozen, batch)
        denominator = jnp.maximum(tokens, 1)
        grads = jax.tree.map(lambda g: g / denominator, grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        metrics = {
            "loss": total / denominator,
            "grad_norm": optax.tree.norm(grads),
            "supervised_tokens": tokens,
            **count_work(model.config, batch),
        }
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state), metrics

    return train_step


def make_eval_step(model: LlavaModel, chunk: int):
    """(trainable, frozen, batch) -> (sum of token losses, supervised tokens)."""

    def eval_step(trainable, frozen, batch):
        return batch_loss(model, merge_params(trainable, frozen), batch, chunk)

    return eval_step
