"""Where the parameters of a model are, and in which form.

A mesh holds as many copies of the model as its data axis is long. The parameters of a copy are
sharded by the rules of training.
"""

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, SingleDeviceSharding

from llava_jax.models.decoder import separate_layers
from llava_jax.models.llava import LlavaConfig, abstract_params
from llava_jax.models.precision import compute_precision
from llava_jax.models.quantization import cut_groups, pack_kernels, quantize_kernels
from llava_jax.parallel.sharding import (
    param_shardings,
    put,
    quantized_shardings,
    replicated,
    shards_of_inputs,
)
from llava_jax.weights.quantized import KernelPart, quantized_parts
from llava_jax.weights.tensors import LazyParameter, read_tree


def copies(mesh: Mesh | None) -> list[Mesh | None]:
    """The devices of each copy of the model, as meshes of their own; [None] for one device."""
    if mesh is None:
        return [None]
    return [
        Mesh(mesh.devices[i : i + 1], mesh.axis_names, axis_types=mesh.axis_types)
        for i in range(mesh.shape["data"])
    ]


def load_params(
    config: LlavaConfig,
    params: dict,
    mesh: Mesh | None,
    dtype: str,
    quantize: str | None = None,
) -> dict:
    """Stored parameters on the devices of the first copy, each of which reads its part alone.

    Args:
      params: leaves have a shape and give arrays for slices; see `sharding.put`.
      mesh: of the devices; None for the default one.
      dtype: of the arrays, where they are floats that are not quantized.
      quantize: form of the language model's kernels, one of quantization.FORMS.
    """
    flat, shardings = flatten_dict(params, keep_empty_nodes=True), {}
    if mesh is not None:
        shardings = param_shardings(copies(mesh)[0], abstract_params(config))
    flat = quantized_parts(flat, quantize, shards=shards_of_inputs(shardings))
    stored = lambda leaf: leaf.dtype if isinstance(leaf, KernelPart) else jnp.dtype(dtype)
    if mesh is None:
        lazy = {"/".join(p): leaf for p, leaf in flat.items() if isinstance(leaf, LazyParameter)}
        flat |= flatten_dict(read_tree(lazy, dtype, "weights"))  # in the order of the files
        here = SingleDeviceSharding(jax.devices()[0])
        return jax.tree.map(lambda leaf: put(leaf, here, stored(leaf)), unflatten_dict(flat))
    tree = unflatten_dict(flat)
    place = lambda leaf, to: put(leaf, to, stored(leaf))
    return jax.tree.map(place, tree, quantized_shardings(shardings, tree))


def fast_form(params: dict, dtype: str, mesh: Mesh | None) -> dict:
    """Loaded parameters in the form that computes fastest on their devices.

    A CPU computes with separate layers, and in bfloat16 with kernels rounded beforehand.
    """
    if jax.default_backend() == "cpu" and (mesh is None or copies(mesh)[0].size == 1):
        params = {**params, "decoder": separate_layers(params["decoder"])}
        arrays, products = compute_precision(dtype)
        if "bfloat16" in (arrays.name, products):
            params = pack_kernels(params)
    return params


def copy_params(config: LlavaConfig, params: dict, quantize: str | None, part: Mesh | None) -> dict:
    """Parameters on some devices -> those of one copy of the model, on its own devices.

    Args:
      quantize: form of the language model's kernels; those that are integers already stay so.
    """
    if part is None:
        return quantize_kernels(params, quantize) if quantize else params
    if part.size == 1:
        params = jax.device_put(params, replicated(part))
        return quantize_kernels(params, quantize) if quantize else params
    shardings = param_shardings(part, abstract_params(config))
    params = jax.device_put(params, quantized_shardings(shardings, params))
    if quantize:
        params = quantize_kernels(params, quantize)
    params = cut_groups(params, shards_of_inputs(shardings))
    return jax.device_put(params, quantized_shardings(shardings, params))
