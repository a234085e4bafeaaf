"""LoRA against its formula, W + alpha / rank * A B, and its dropout, against PEFT's."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import PartitionSpec

from llava_jax.models.linear import Linear, dropout
from llava_jax.models.llava import LlavaModel, abstract_params
from llava_jax.models.lora import LoraConfig, abstract_lora, attach_lora, init_lora, merge_lora
from llava_jax.parallel.mesh import make_mesh
from llava_jax.parallel.sharding import param_shardings
from tests.tiny_model import CONFIG, features_of, random_params

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


def hidden_states(params: dict, model: LlavaModel = MODEL) -> jax.Array:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 290, (2, 12)).astype(np.int32)
    ids[:, 2:6] = CONFIG.image_token_id
    images = rng.integers(0, 256, (2, 1, 8, 8, 3)).astype(np.uint8)
    positions = np.tile(np.arange(12), (2, 1))
    return model.apply(
        {"params": params}, ids, images, *features_of(ids, 1).values(), positions, np.ones_like(ids)
    )[0]


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


DROPPED = dataclasses.replace(LORA, dropout=0.25)


def keys(seed: int = 0, rows: int = 2) -> jax.Array:
    return jax.random.split(jax.random.key(seed), rows)


def test_dropout_meets_its_rate_and_depends_on_the_row_s_key_alone():
    x = jnp.ones((3, 50, 401))
    data = jax.random.key_data(jax.random.split(jax.random.key(1), 3))
    found = np.asarray(dropout(x, jnp.float32(0.05), data))
    assert set(np.unique(found)) == {0, np.float32(1) / np.float32(0.95)}
    dropped = found == 0
    assert abs(dropped.mean() - 0.05) < 4 * (0.05 * 0.95 / x.size) ** 0.5
    for axis in (0, 1, 2):  # neighbours are dropped together as often as by chance
        a, b = (np.take(dropped, range(i, x.shape[axis] - 1 + i), axis) for i in (0, 1))
        assert abs((a & b).mean() - 0.05**2) < 5 * (0.05**2 / x.size) ** 0.5
    assert 0.03 < dropped.mean(axis=(0, 2)).min() < dropped.mean(axis=(0, 2)).max() < 0.07
    np.testing.assert_array_equal(dropout(x[1:2], jnp.float32(0.05), data[1:2])[0], found[1])
    # An axis more, the same places.
    heads = dropout(x.reshape(3, 50, 1, 401), jnp.float32(0.05), data)
    np.testing.assert_array_equal(heads.reshape(x.shape), found)


def test_every_bit_of_a_key_counts():
    one_off = np.uint32(1) << np.arange(32, dtype=np.uint32)
    words = np.array([7, 11], np.uint32)
    data = [words, *(words ^ [bit, 0] for bit in one_off), *(words ^ [0, bit] for bit in one_off)]
    ones = jnp.ones((len(data), 200, 100))
    dropped = np.asarray(dropout(ones, jnp.float32(0.5), jnp.asarray(data, jnp.uint32))) == 0
    agree = (dropped[1:] == dropped[0]).mean(axis=(1, 2))
    assert abs(agree - 0.5).max() < 5 * 0.5 / 20_000**0.5


def test_dropout_is_peft_s():
    """PEFT's own layer, training, given our zeros in place of those that it would draw."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    rng = np.random.default_rng(0)
    kernel, a, b = (rng.normal(size=s).astype(np.float32) for s in ((6, 5), (6, 2), (2, 5)))
    x = rng.normal(size=(2, 7, 6)).astype(np.float32)
    rate, data = jnp.float32(0.4), jax.random.key_data(keys())
    zeros = np.asarray(dropout(jnp.ones_like(x), rate, data)) == 0
    assert 0 < zeros.sum() < zeros.size

    class Dropout(torch.nn.Dropout):
        def forward(self, x):
            assert self.training and abs(self.p - 0.4) < 1e-6
            return x.masked_fill(torch.from_numpy(zeros), 0) / (1 - self.p)

    theirs = torch.nn.Sequential(torch.nn.Linear(6, 5, bias=False))
    config = peft.LoraConfig(r=2, lora_alpha=3, lora_dropout=0.4, target_modules=["0"])
    theirs = peft.get_peft_model(theirs, config).train()
    layer = theirs.base_model.model[0]
    layer.lora_dropout["default"].__class__ = Dropout
    weights = ((layer.base_layer, kernel), (layer.lora_A["default"], a))
    with torch.no_grad():
        for module, value in (*weights, (layer.lora_B["default"], b)):
            module.weight.copy_(torch.from_numpy(value.T.copy()))
    inputs = torch.from_numpy(x).requires_grad_()
    wanted = theirs(inputs)
    wanted.square().sum().backward()

    def ours(x, a, b):
        pair = {"lora_a": a, "lora_b": b * 1.5, "lora_keys": data, "lora_dropout": rate}
        linear = Linear(5, ("embed", "mlp"), jnp.float32, use_bias=False)
        return linear.apply({"params": {"kernel": kernel} | pair}, x)

    np.testing.assert_allclose(ours(x, a, b), wanted.detach(), rtol=1e-5, atol=1e-5)
    grads = jax.grad(lambda *args: jnp.sum(ours(*args) ** 2), (0, 1, 2))(x, a, b)
    by_torch = inputs.grad, *(m.weight.grad.T for m in (weights[1][0], layer.lora_B["default"]))
    for found, value in zip(grads, by_torch, strict=True):
        np.testing.assert_allclose(found, value, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def dropped():
    """Random keys, or None -> (hidden states, gradient of the update), each by remat policy."""
    params = with_update()

    @functools.partial(jax.jit, static_argnums=1)
    def run(row_keys, policy="none"):
        def loss(pairs):
            attached = attach_lora(params | {"lora": pairs}, DROPPED, row_keys)
            hidden = hidden_states(attached, LlavaModel(CONFIG, remat_policy=policy))
            return jnp.sum(hidden**2), hidden

        (_, hidden), grads = jax.value_and_grad(loss, has_aux=True)(params["lora"])
        return hidden, grads

    return run


def test_each_layer_and_each_step_drops_others(dropped):
    attached = flatten_dict(jax.jit(lambda: attach_lora(with_update(), DROPPED, keys()))())
    drawn = [np.asarray(leaf) for path, leaf in attached.items() if path[-1] == "lora_keys"]
    every = np.concatenate([leaf.reshape(-1, 2) for leaf in drawn])  # of layers and rows
    assert len(drawn) == 10 and len(np.unique(every, axis=0)) == len(every)
    first, again, other = (dropped(keys(seed))[0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert float(abs(first - other).max()) > 0.1


def test_without_keys_nothing_is_dropped(dropped):
    whole = jax.jit(hidden_states)(attach_lora(with_update(), LORA))
    np.testing.assert_allclose(dropped(None)[0], whole, rtol=1e-5, atol=1e-5)
    assert float(abs(dropped(keys())[0] - whole).max()) > 0.1


def test_the_recomputed_pass_drops_the_same(dropped):
    found, wanted = (jax.tree.leaves(dropped(keys(), policy)[1]) for policy in ("full", "none"))
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(abs(b).max()))
