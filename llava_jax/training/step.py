"""The jitted training step: loss and gradient of the trainable tree, then one optimizer update."""

import dataclasses
from collections.abc import Callable
from typing import Protocol

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from llava_jax.models.decoder import output_embedding
from llava_jax.models.llava import LlavaConfig, LlavaModel
from llava_jax.parallel.sharding import RULES_OF_A_PART
from llava_jax.text.tokenization import IGNORE_INDEX
from llava_jax.training.losses import cross_entropy_sum, next_token_targets
from llava_jax.training.optimizer import merge_params

PARITY_DEVICES = 8
REFERENCE = "reference"  # among frozen parameters: where those that train started, to compare with
# No windowed einsums, which cut a product into one for each device's slice of the weights: with
# them large models take many times longer to compile. Whether gathers hide behind products (async
# collective fusion) is left to the compiler: forced on v5p or v6e, it warns of wrong results.
# On GPUs, the scheduler that hides transfers behind products, which A100 otherwise goes without.
COMPILER_OPTIONS = {
    "tpu": {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"},
    "gpu": {"xla_gpu_enable_latency_hiding_scheduler": True},
}
MODEL_INPUTS = (
    "input_ids", "tiles", "feature_ids", "feature_places", "position_ids", "segment_ids"
)  # fmt: skip


@flax.struct.dataclass
class TrainState:
    """All that a step changes and a checkpoint keeps; frozen parameters are not part of it."""

    step: jax.Array  # int32, optimizer updates done
    params: dict  # the trainable tree, float32 masters
    opt_state: optax.OptState


def batch_targets(batch: dict) -> jax.Array:
    """int[B, T], the token that each position must predict."""
    return next_token_targets(batch["labels"], batch["segment_ids"], batch.get("turn_ids"))


def supervised_tokens(batch: dict) -> jax.Array:
    """int[B], those of each row."""
    return jnp.sum(batch_targets(batch) != IGNORE_INDEX, axis=1)


def model_inputs(batch: dict) -> tuple[list[jax.Array], dict]:
    """The arguments of a `LlavaModel` that a batch holds, in their order and by name."""
    more = {name: batch.get(name) for name in ("turn_ids", "feature_weights", "seen")}
    return [batch.get(name) for name in MODEL_INPUTS], more


class Loss(Protocol):
    """What a stage minimises: a sum over units, which are the tokens of answers, or pairs.

    Attributes:
      model: the module.
      figures: names of the other sums that a call gives, for the log.
    """

    model: LlavaModel
    figures: tuple[str, ...]

    def units(self, batch: dict) -> jax.Array:
        """int[B], units in each row."""

    def __call__(
        self, params: dict, frozen: dict, batch: dict, weights: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """(loss, its other figures), float32, sums over the units of a batch.

        Args:
          params: as the model takes them.
          frozen: the frozen parameters of the stage.
          weights: float32 [B], of a unit of each row.
        """


@dataclasses.dataclass(frozen=True)
class AnswerLoss:
    """Cross-entropy of the supervised tokens.

    Attributes:
      model: the module.
      chunk: see `cross_entropy_sum`.
    """

    model: LlavaModel
    chunk: int
    figures = ()

    def units(self, batch: dict) -> jax.Array:
        return supervised_tokens(batch)

    def __call__(self, params, frozen, batch, weights):
        del frozen
        inputs, more = model_inputs(batch)
        hidden_states = self.model.apply({"params": params}, *inputs, **more)
        table = output_embedding(params["decoder"])
        targets = batch_targets(batch)
        return cross_entropy_sum(hidden_states, table, targets, weights, self.chunk), {}


def row_weights(units: jax.Array, parity: bool) -> jax.Array:
    """The weight of a unit of each row in the loss of a step, float32 [B].

    All units weigh the same. With `parity`, each eighth of the batch weighs the same, and so do all
    tokens within it: the mean of means of the original, which was trained on 8 GPUs.

    Args:
      units: int[B], those of each row; see `Loss`.
    """
    parts = PARITY_DEVICES if parity else 1
    totals = jnp.sum(units.reshape(parts, -1), axis=1, dtype=jnp.float32)
    return jnp.repeat(1 / (parts * jnp.maximum(totals, 1)), len(units) // parts)


def count_work(config: LlavaConfig, batch: dict) -> dict[str, jax.Array]:
    """The contents of a batch without padding, for throughput and MFU."""
    real = batch["segment_ids"] != 0
    last = jnp.max(batch["feature_ids"].reshape(len(real), -1), axis=1)
    tiles = last // config.tokens_per_tile + 1  # [B]
    return {
        "tokens": jnp.sum(real),
        "images": jnp.sum(tiles),
        # float32: over a pod batch the number of pairs outgrows int32
        "attention_pairs": jnp.sum(
            jnp.where(real, batch["position_ids"] + 1, 0), dtype=jnp.float32
        ),
    }


def with_kernels_as(params: dict, dtype) -> dict:
    """Casts the kernels of linear layers, which are nearly all parameters, to another dtype.

    Their gradients then have that dtype too: bfloat16 halves their memory and the bytes that
    devices exchange to add them up. All other parameters, and sums over microbatches, stay float32.
    """

    def cast(path, leaf):
        return leaf.astype(dtype) if path[-1].key == "kernel" else leaf

    return jax.tree_util.tree_map_with_path(cast, params)


def join_params(trainable: dict, frozen: dict, row_keys: jax.Array | None = None) -> dict:
    """Parameters as a model without LoRA takes them; no random numbers are drawn."""
    del row_keys
    own = {name: tree for name, tree in frozen.items() if name != REFERENCE}
    return merge_params(trainable, own)


def make_train_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    accumulation: int,
    join: Callable = join_params,
    parity: bool = False,
    seed: int = 0,
):
    """A step function (state, frozen, batch) -> (state, metrics), to be jitted.

    The batch is cut into `accumulation` microbatches; loss and gradients are summed over them in
    float32. The weights of rows are those of `row_weights` for the whole batch, so the result does
    not depend on how it was cut.

    Args:
      loss: what is minimised.
      join: (trainable, frozen, random keys of the rows) -> parameters as the model takes them.
      seed: of the keys. The key of a row depends on it, on the step and on the row's place in the
        batch.
    """

    def sums_and_grads(trainable, frozen, batch, weights, keys):
        """((loss, other figures), gradients of the loss)."""
        total = lambda t: loss(join(t, frozen, keys), frozen, batch, weights)
        (value, figures), grads = jax.value_and_grad(total, has_aux=True)(trainable)
        # Cast before the parts of the data axis are summed: XLA for CPUs cannot sum bfloat16.
        return (value, figures), jax.tree.map(lambda g: g.astype(jnp.float32), grads)

    def accumulated(trainable, frozen, *rows):
        trainable = with_kernels_as(trainable, loss.model.dtype)
        if accumulation == 1:
            return sums_and_grads(trainable, frozen, *rows)

        def add(carry, microbatch):
            found = sums_and_grads(trainable, frozen, *microbatch)
            return jax.tree.map(jnp.add, carry, found), None

        # Strided, so that each microbatch spreads over all devices.
        cut = lambda x: x.reshape(-1, accumulation, *x.shape[1:]).swapaxes(0, 1)
        cuts = jax.tree.map(cut, rows)
        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), trainable)
        nothing = jnp.float32(0), dict.fromkeys(loss.figures, jnp.float32(0))
        return jax.lax.scan(add, (nothing, zeros), cuts)[0]

    def summed(trainable, frozen, *rows):
        """Figures and gradients of a batch, summed over the `data` axis once a step.

        The compiler by itself would sum them for every microbatch, and slices of a pod would wait
        for the slow network between them.
        """
        axes = jax.sharding.get_abstract_mesh().shape
        # With all three axes split, XLA's partitioner aborts at the embedding's lookup.
        if axes.get("data", 1) == 1 or axes["fsdp"] > 1 and axes["tensor"] > 1:
            return accumulated(trainable, frozen, *rows)

        def of_a_part(*arguments):
            with nn.logical_axis_rules(RULES_OF_A_PART):
                return jax.lax.psum(accumulated(*arguments), "data")

        whole, part = PartitionSpec(), PartitionSpec("data")
        parts = jax.shard_map(
            of_a_part,
            in_specs=(whole, whole, *[part] * len(rows)),
            out_specs=whole,
            axis_names={"data"},
            check_vma=False,
        )
        return parts(trainable, frozen, *rows)

    def train_step(state: TrainState, frozen: dict, batch: dict):
        weights = row_weights(loss.units(batch), parity)
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), state.step)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(weights)))
        (value, figures), grads = summed(state.params, frozen, batch, weights, keys)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        metrics = {
            "loss": value,
            "grad_norm": optax.tree.norm(grads),
            "supervised_tokens": jnp.sum(supervised_tokens(batch)),
            **count_work(loss.model.config, batch),
            **figures,
        }
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state), metrics

    return train_step


def make_eval_step(loss: Loss, join: Callable = join_params):
    """(trainable, frozen, batch) -> (sums over the units by name, units); `loss` is one of them."""

    def eval_step(trainable, frozen, batch):
        alike = jnp.ones(len(batch["labels"]), jnp.float32)
        value, figures = loss(join(trainable, frozen), frozen, batch, alike)
        return {"loss": value, **figures}, jnp.sum(loss.units(batch))

    return eval_step
