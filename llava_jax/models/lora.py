"""LoRA (Hu et al. 2021, arXiv:2106.09685): low-rank updates of chosen linear layers.

The update is one more tree of parameters next to the model's components,
`{"lora": {path of a linear layer: {lora_a, lora_b}}}`, trained, saved and sharded like them.
`attach_lora` puts its leaves next to the kernels, and `Linear` adds their product.

R rank, B rows; an axis of layers, if there is one, comes first.
"""

import dataclasses
import fnmatch

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from llava_jax.models.projector import torch_linear_init


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which layers are adapted, and how much.

    Attributes:
      rank: of the update.
      alpha: the update is scaled by alpha / rank.
      targets: shell patterns of layer paths; `*` matches slashes too. The output projection
        cannot be adapted.
      dropout: share of the update's inputs that a training step sets to zero, drawn for each layer
        and token; the rest are multiplied by 1 / (1 - dropout). The layer itself has no dropout.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    dropout: float = 0.0

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def abstract_lora(lora: LoraConfig, boxed_params: dict) -> dict:
    """Shapes and logical axes of the update, given those of the model (`abstract_params`).

    Raises:
      ValueError: a target matches no linear layer.
    """
    is_box = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)
    flat = flatten_dict(boxed_params, is_leaf=lambda _, leaf: is_box(leaf))
    kernels = {
        path[:-1]: box
        for path, box in flat.items()
        if path[-1] == "kernel" and path[-2] != "lm_head"
    }
    tree = {}
    for target in lora.targets:
        matching = [path for path in kernels if fnmatch.fnmatchcase("/".join(path), target)]
        if not matching:
            raise ValueError(
                f"{target!r} matches no linear layer: there are "
                f"{', '.join('/'.join(path) for path in kernels)}"
            )
        for path in matching:
            tree |= _pair(path, kernels[path], lora.rank)
    return unflatten_dict(tree)


def _pair(path: tuple[str, ...], kernel: nn.LogicallyPartitioned, rank: int) -> dict:
    *layers, rows, columns = kernel.value.shape
    *layer_axis, into, out = kernel.names

    def box(shape, names):
        value = jax.ShapeDtypeStruct((*layers, *shape), jnp.float32)
        return nn.LogicallyPartitioned(value, (*layer_axis, *names))

    return {
        (*path, "lora_a"): box((rows, rank), (into, "lora_rank")),
        (*path, "lora_b"): box((rank, columns), ("lora_rank", out)),
    }


def init_lora(boxed_lora: dict, key: jax.Array) -> dict:
    """Fresh parameters as in PEFT: lora_a uniform, scaled by its inputs, and lora_b zero."""
    flat = flatten_dict(nn.meta.unbox(boxed_lora))
    keys = jax.random.split(key, len(flat))

    def draw(path, leaf, key):
        if path[-1] == "lora_b":
            return jnp.zeros(leaf.shape, leaf.dtype)
        return torch_linear_init(leaf.shape[-2])(key, leaf.shape, leaf.dtype)

    return unflatten_dict(
        {path: draw(path, leaf, k) for (path, leaf), k in zip(flat.items(), keys, strict=True)}
    )


def attach_lora(params: dict, lora: LoraConfig, row_keys: jax.Array | None = None) -> dict:
    """The model's tree with each pair next to its kernel, and lora_b scaled.

    Args:
      row_keys: [B] random keys, one a row of the batch, to draw dropout with; None for no dropout.
    """
    flat = flatten_dict({name: tree for name, tree in params.items() if name != "lora"})
    for i, (path, leaf) in enumerate(sorted(flatten_dict(params["lora"]).items())):
        flat[path] = leaf * lora.scale if path[-1] == "lora_b" else leaf
        if path[-1] == "lora_b" and lora.dropout and row_keys is not None:
            keys = jax.vmap(lambda key, i=i: jax.random.fold_in(key, i))(row_keys)
            layers = leaf.shape[:-2]
            flat[*path[:-1], "lora_dropout"] = jnp.full(layers, lora.dropout)
            flat[*path[:-1], "lora_keys"] = _for_layers(keys, *layers)
    return unflatten_dict(flat)


def _for_layers(keys: jax.Array, layers: int | None = None) -> jax.Array:
    """Keys [B] -> uint32[layers, B, 2], different in each layer; uint32[B, 2] without layers."""
    if layers is None:
        return jax.random.key_data(keys)
    fold = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (None, 0))
    return jax.random.key_data(fold(keys, jnp.arange(layers)))


def merge_lora(params: dict, lora: LoraConfig) -> dict:
    """The tree of a model without LoRA: the update is added to the kernels, in float32."""
    flat = flatten_dict({name: tree for name, tree in params.items() if name != "lora"})
    pairs = flatten_dict(params["lora"])
    for path in [path[:-1] for path in pairs if path[-1] == "lora_a"]:
        kernel = flat[*path, "kernel"]
        with jax.default_matmul_precision("highest"):
            update = jnp.matmul(pairs[*path, "lora_a"], pairs[*path, "lora_b"]) * lora.scale
        flat[*path, "kernel"] = (kernel + update).astype(kernel.dtype)
    return unflatten_dict(flat)
