"""Where the parameters of a model are, and in which form.

A mesh holds as many copies of the model as its data axis is long. The parameters of a copy are
sharded by the rules of training.
"""

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from llava_jax.inference.quantization import pack_kernels, quantize_kernels
from llava_jax.models.decoder import separate_layers
from llava_jax.models.llava import LlavaConfig, abstract_params
from llava_jax.models.precision import compute_precision
from llava_jax.parallel.sharding import param_shardings, put, replicated


def copies(mesh: Mesh | None) -> list[Mesh | None]:
    """The devices of each copy of the model, as meshes of their own; [None] for one device."""
    if mesh is None:
        return [None]
    return [
        Mesh(mesh.devices[i : i + 1], mesh.axis_names, axis_types=mesh.axis_types)
        for i in range(mesh.shape["data"])
    ]


def load_params(config: LlavaConfig, params: dict, mesh: Mesh, dtype: str) -> dict:
    """Stored parameters on the devices of the first copy, each of which reads its part alone.

    Args:
      params: leaves have a shape and give arrays for slices; see `sharding.put`.
      dtype: of the arrays.
    """
    shardings = flatten_dict(param_shardings(copies(mesh)[0], abstract_params(config)))
    flat = flatten_dict(params, keep_empty_nodes=True)
    return unflatten_dict(
        {
            path: put(leaf, shardings[path], jnp.dtype(dtype)) if path in shardings else leaf
            for path, leaf in flat.items()
        }
    )


def fast_form(params: dict, dtype: str, quantize: bool, mesh: Mesh | None) -> dict:
    """Loaded parameters in the form that computes fastest on their devices.

    A CPU computes with separate layers, and in bfloat16 with kernels rounded beforehand.
    """
    if jax.default_backend() == "cpu" and (mesh is None or copies(mesh)[0].size == 1):
        params = {**params, "decoder": separate_layers(params["decoder"])}
        arrays, products = compute_precision(dtype)
        if not quantize and "bfloat16" in (arrays.name, products):
            params = pack_kernels(params)
    return params


def copy_params(config: LlavaConfig, params: dict, quantize: bool, part: Mesh | None) -> dict:
    """Parameters on some devices -> those of one copy of the model, on its own devices."""
    if part is not None and part.size == 1:
        params = jax.device_put(params, replicated(part))
    elif part is not None:
        params = jax.device_put(params, param_shardings(part, abstract_params(config)))
    return quantize_kernels(params) if quantize else params
