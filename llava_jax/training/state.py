"""The training state before the first step; its arrays are created on the mesh."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from llava_jax.errors import LlavaError
from llava_jax.models.llava import LlavaConfig, abstract_params
from llava_jax.models.lora import LoraConfig, abstract_lora, attach_lora
from llava_jax.models.quantization import cut_groups, quantize_kernels
from llava_jax.parallel.sharding import (
    param_shardings,
    put,
    quantized_shardings,
    replicated,
    shards_of_inputs,
)
from llava_jax.training.optimizer import optimizer_shardings, split_params
from llava_jax.training.step import REFERENCE, TrainState, join_params
from llava_jax.weights.quantized import packed_tensors, quantized_parts


def abstract_model(config: LlavaConfig, lora: LoraConfig | None) -> dict:
    """Shapes and logical axes of all parameters: vision, projector, decoder, and lora if any."""
    boxed = abstract_params(config)
    return boxed if lora is None else boxed | {"lora": abstract_lora(lora, boxed)}


def abstract_state(
    mesh: Mesh,
    boxed_params: dict,
    groups: dict[str, float],
    optimizer: optax.GradientTransformation,
    frozen_dtype: jnp.dtype,
    reference: bool = False,
    quantize: str | None = None,
) -> tuple[TrainState, dict]:
    """Shapes, dtypes and shardings of (state, frozen parameters); nothing is computed.

    Args:
      boxed_params: from `abstract_model`.
      groups: what trains; see `split_params`.
      reference: among the frozen ones are the parameters that train, as they start (REFERENCE).
      quantize: form of the language model's kernels, all of them frozen, besides its output.
    """
    shapes = split_params(nn.meta.unbox(boxed_params), groups)
    places = split_params(param_shardings(mesh, boxed_params), groups)
    placed = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    trainable = jax.tree.map(placed, shapes[0], places[0])
    kept = lambda leaf, to: jax.ShapeDtypeStruct(leaf.shape, frozen_dtype, sharding=to)
    frozen = jax.tree.map(kept, shapes[1], places[1])
    if quantize:
        frozen = _quantized(frozen, places[1], quantize)
    start = {name: tree for name, tree in trainable.items() if name != "lora"}
    if reference and start:
        frozen[REFERENCE] = jax.tree.map(lambda leaf: kept(leaf, leaf.sharding), start)
    moments = optimizer_shardings(optimizer, trainable, places[0], replicated(mesh))
    opt_state = jax.tree.map(placed, jax.eval_shape(optimizer.init, trainable), moments)
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh))
    return TrainState(step, trainable, opt_state), frozen


def _quantized(frozen: dict, shardings: dict, form: str) -> dict:
    """Shapes, dtypes and shardings of frozen parameters with quantized kernels."""
    shards = shards_of_inputs(shardings)
    quantized = jax.eval_shape(
        lambda params: cut_groups(quantize_kernels(params, form, head=False), shards), frozen
    )
    placed = lambda leaf, to: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=to)
    return jax.tree.map(placed, quantized, quantized_shardings(shardings, quantized))


def place(params: dict, like: dict, quantize: str | None = None) -> dict:
    """Puts the parameters that `like` names on the devices; each gets its own slices only.

    Those below REFERENCE are the same parameters, in the place of their own.

    Args:
      quantize: as in `abstract_state`; kernels are rounded on the host.
    """
    flat, wanted = flatten_dict(params), flatten_dict(like)
    if quantize:
        if packed := [tensor for leaf in flat.values() for tensor in packed_tensors(leaf)]:
            raise LlavaError(
                f"config.model.quantize is {quantize}, but {packed[0].place} is quantized already "
                f"({packed[0].packing}): start from the model before it was quantized"
            )
        shards = shards_of_inputs(jax.tree.map(lambda leaf: leaf.sharding, like))
        flat = quantized_parts(flat, quantize, head=False, shards=shards)
    flat |= {(REFERENCE, *path): leaf for path, leaf in flat.items()}
    chosen = unflatten_dict({path: flat[path] for path in wanted})
    return jax.tree.map(lambda leaf, to: put(leaf, to.sharding, to.dtype), chosen, like)


def fresh_state(like: TrainState, params: dict, optimizer) -> TrainState:
    """Step 0: parameters from the host, moments created on their devices."""
    trainable = place(params, like.params)
    moments = jax.tree.map(lambda leaf: leaf.sharding, like.opt_state)
    opt_state = jax.jit(optimizer.init, out_shardings=moments)(trainable)
    return TrainState(put(0, like.step.sharding, jnp.int32), trainable, opt_state)


def joined(lora: LoraConfig | None) -> Callable[..., dict]:
    """(trainable, frozen[, row keys in training]) -> parameters as the model takes them."""
    if lora is None:
        return join_params
    return lambda trainable, frozen, row_keys=None: attach_lora(
        join_params(trainable, frozen), lora, row_keys
    )
