"""LoRA against its formula, W + alpha / rank * A B, which is PEFT's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import PartitionSpec

from llava_jax.models.llava import LlavaModel, abstract_params
from llava_jax.models.lora import LoraConfig, abstract_lora, attach_lora, init_lora, merge_lora
from llava_jax.parallel.mesh import make_mesh
from llava_jax.parallel.sharding import param_shardings
from tests.tiny_model import CONFIG, random_params

LORA = LoraConfig(4, 6.0, ("decoder/layers/*", "vision/layers/*/?_proj"))
MODEL = LlavaModel(CONFIG)


def with_update(lora: LoraConfig = LORA) -> dict:
    """The tiny model with an update that is not zero."""
    shapes = jax.tree.map(
        jnp.asarray, init_lora(abstract_lora(lora, abstract_params(CONFIG)), jax.random.key(0))
    )
    rng = np.random.default_rng(1)
    update = jax.tree.map(lambda x: jnp.asarray(0.1 * rng.normal(size=x.shape), x.dtype), shapes)
    return random_params(CONFIG) | {"lora": update}


def hidden_states(params: dict) -> jax.Array:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 290, (2, 12)).astype(np.int32)
    ids[:, 2:6] = CONFIG.image_token_id
    images = rng.integers(0, 256, (2, 1, 8, 8, 3)).astype(np.uint8)
    positions = np.tile(np.arange(12), (2, 1))
    return MODEL.apply({"params": params}, ids, images, positions, np.ones_like(ids))[0]


def test_attached_is_merged_in_value_and_gradient():
    params = with_update()
    attached, merged = (
        jax.jit(jax.value_and_grad(lambda p, f=f: jnp.sum(hidden_states(f(p, LORA)) ** 2)))(params)
        for f in (attach_lora, merge_lora)
    )
    np.testing.assert_allclose(attached[0], merged[0], rtol=1e-5)
    assert abs(attached[0] - jnp.sum(hidden_states(random_params(CONFIG)) ** 2)) > 1
    for path, wanted in flatten_dict(merged[1]["lora"]).items():
        found = flatten_dict(attached[1]["lora"])[path]
        assert float(abs(wanted).max()) > 0
        np.testing.assert_allclose(
            found, wanted, rtol=1e-3, atol=1e-4 * float(abs(wanted).max()), err_msg=str(path)
        )


def test_merged_is_the_formula():
    params = with_update()
    merged = merge_lora(params, LORA)
    assert jax.tree.structure(merged) == jax.tree.structure(random_params(CONFIG))
    pair = params["lora"]["decoder"]["layers"]["mlp"]["down_proj"]
    kernel = params["decoder"]["layers"]["mlp"]["down_proj"]["kernel"]
    for layer in range(2):
        wanted = kernel[layer] + 6.0 / 4 * np.array(pair["lora_a"][layer]) @ pair["lora_b"][layer]
        found = merged["decoder"]["layers"]["mlp"]["down_proj"]["kernel"][layer]
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    untouched = merged["vision"]["layers"]["mlp"]["fc1"]["kernel"]
    np.testing.assert_array_equal(untouched, params["vision"]["layers"]["mlp"]["fc1"]["kernel"])


def test_a_fresh_update_changes_nothing_and_can_learn():
    boxed = abstract_lora(LORA, abstract_params(CONFIG))
    fresh = flatten_dict(init_lora(boxed, jax.random.key(0)))
    for path, leaf in fresh.items():
        bound = leaf.shape[-2] ** -0.5  # PEFT's kaiming_uniform with a = sqrt(5)
        size = float(abs(leaf).max())
        assert size == 0 if path[-1] == "lora_b" else 0.8 * bound < size <= bound


def test_targets_choose_layers_by_their_path():
    chosen = {path[:-1] for path in flatten_dict(abstract_lora(LORA, abstract_params(CONFIG)))}
    decoder = {path for path in chosen if path[0] == "decoder"}
    assert {path[-1] for path in decoder} == {
        f"{n}_proj" for n in ("q", "k", "v", "o", "gate", "up", "down")
    }
    assert {path[-1] for path in chosen - decoder} == {"q_proj", "k_proj", "v_proj"}


@pytest.mark.parametrize("target", ["decoder/layer/*", "decoder/lm_head", "decoder/embed_tokens"])
def test_a_target_without_a_linear_layer_names_what_there_is(target):
    start = target.split("*")[0]
    with pytest.raises(ValueError, match=f"'{start}.* matches no .*there are .*decoder/layers/mlp"):
        abstract_lora(LoraConfig(4, 1.0, (target,)), abstract_params(CONFIG))


def test_an_update_is_spread_like_its_kernel():
    mesh = make_mesh(data=1, fsdp=4, tensor=2)
    boxed = abstract_params(CONFIG)
    kernels = param_shardings(mesh, boxed)["decoder"]["layers"]["mlp"]["up_proj"]
    pair = param_shardings(mesh, abstract_lora(LORA, boxed))["decoder"]["layers"]["mlp"]["up_proj"]
    layers, into, out = kernels["kernel"].spec
    assert (into, out) == ("fsdp", "tensor")
    assert pair["lora_a"].spec == PartitionSpec(layers, into, None)
    assert pair["lora_b"].spec == PartitionSpec(layers, None, out)
