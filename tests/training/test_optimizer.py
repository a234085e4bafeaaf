"""AdamW against torch's, the schedule against transformers', and trainable apart from frozen."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llava_jax.errors import LlavaError
from llava_jax.training.optimizer import (
    adamw,
    group_of,
    merge_params,
    round_stochastically,
    split_params,
    warmup_cosine,
)

OPTIONS = {"b1": 0.9, "b2": 0.98, "eps": 1e-6, "weight_decay": 0.1, "clip_norm": 1.0}
RNG = np.random.default_rng(0)
SHAPES = {
    "projector": {"linear_0": {"kernel": (4, 5), "bias": (5,)}},
    "decoder": {
        "embed_tokens": {"embedding": (7, 5)},
        "layers": {"input_layernorm": {"scale": (2, 5)}},
    },
}


def draw(scale: float = 1.0) -> dict:
    is_shape = lambda x: isinstance(x, tuple)
    return jax.tree.map(
        lambda shape: jnp.asarray(scale * RNG.normal(size=shape), jnp.float32),
        SHAPES,
        is_leaf=is_shape,
    )


def train(groups: dict, schedule, gradients: list, params: dict, **changes) -> dict:
    optimizer = adamw(groups, schedule, **OPTIONS | changes)

    @jax.jit
    def update(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for gradient in gradients:
        params, state = update(params, state, gradient)
    return params


def train_torch(rates: dict, shares, gradients: list, params: dict, clip_norm: float) -> dict:
    """The same with torch: a parameter group for each rate, with and without weight decay."""
    torch = pytest.importorskip("torch")
    leaves = jax.tree_util.tree_leaves_with_path(params)
    paths = ["/".join(key.key for key in path) for path, _ in leaves]
    tensors = [torch.nn.Parameter(torch.tensor(np.array(leaf))) for _, leaf in leaves]
    decay = lambda path: 0.1 if path.endswith(("kernel", "embedding")) else 0.0
    rate = lambda path: next(r for group, r in rates.items() if path.startswith(group))
    optimizer = torch.optim.AdamW(
        [
            {"params": [tensor], "lr": rate(path), "weight_decay": decay(path)}
            for path, tensor in zip(paths, tensors, strict=True)
        ],
        betas=(0.9, 0.98),
        eps=1e-6,
    )
    for step, gradient in enumerate(gradients):
        for tensor, leaf in zip(tensors, jax.tree.leaves(gradient), strict=True):
            tensor.grad = torch.tensor(np.array(leaf))
        if clip_norm:
            torch.nn.utils.clip_grad_norm_(tensors, clip_norm)
        for group, path in zip(optimizer.param_groups, paths, strict=True):
            group["lr"] = rate(path) * float(shares(step))
        optimizer.step()
    found = [tensor.detach().numpy() for tensor in tensors]
    return jax.tree.unflatten(jax.tree.structure(params), found)


@pytest.mark.parametrize("clip_norm", [1.0, 0.0])
def test_adamw_is_that_of_torch(clip_norm):
    rates, schedule = {"projector": 1e-2, "decoder": 1e-3}, warmup_cosine(6, 0.3)
    # Norms on both sides of the clipping limit.
    params, gradients = draw(), [draw(scale) for scale in (0.01, 1.0, 5.0, 0.05, 1.0)]
    found = train(rates, schedule, gradients, params, clip_norm=clip_norm)
    wanted = train_torch(rates, schedule, gradients, params, clip_norm)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_weight_decay_spares_biases_norms_and_layer_scales():
    params = draw()
    still = jax.tree.map(jnp.zeros_like, params)
    rates = {"projector": 1e-2, "decoder": 1e-2}
    after = train(rates, lambda step: 1.0, [still] * 3, params)
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), params, after)
    assert changed == {
        "projector": {"linear_0": {"kernel": True, "bias": False}},
        "decoder": {
            "embed_tokens": {"embedding": True},
            "layers": {"input_layernorm": {"scale": False}},
        },
    }


def test_each_group_has_its_rate():
    """Adam's first step is the rate itself, whatever the gradient's size."""
    ones, params = jax.tree.map(jnp.ones_like, draw()), draw()
    rates = {"projector": 1e-2, "decoder": 1e-3, "decoder/embed_tokens": 1e-4}
    after = train(rates, lambda step: 0.5, [ones], params, weight_decay=0.0, eps=1e-12)
    moved = jax.tree.map(lambda a, b: float((a - b).mean()), params, after)
    np.testing.assert_allclose(moved["projector"]["linear_0"]["bias"], 0.5e-2, rtol=1e-3)
    np.testing.assert_allclose(moved["decoder"]["embed_tokens"]["embedding"], 0.5e-4, rtol=1e-2)
    scale = moved["decoder"]["layers"]["input_layernorm"]["scale"]
    np.testing.assert_allclose(scale, 0.5e-3, rtol=1e-2)


@pytest.mark.parametrize("steps, ratio", [(100, 0.03), (7, 0.5), (10, 0.0), (1, 0.03), (33, 0.1)])
def test_the_schedule_is_that_of_transformers(steps, ratio):
    torch = pytest.importorskip("torch")
    from transformers import get_cosine_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    # transformers' Trainer takes ceil(steps * warmup_ratio) steps of warm-up.
    warmup = int(np.ceil(steps * ratio))
    reference = get_cosine_schedule_with_warmup(optimizer, warmup, steps)
    wanted = []
    for _ in range(steps):
        wanted.append(reference.get_last_lr()[0])
        optimizer.step()
        reference.step()
    schedule = warmup_cosine(steps, ratio)
    np.testing.assert_allclose([schedule(s) for s in range(steps)], wanted, rtol=1e-5, atol=1e-6)


def test_trainable_and_frozen_are_parted_and_joined():
    params = draw()
    groups = {"projector": 1.0, "decoder/layers": 1.0}
    trainable, frozen = split_params(params, groups)
    assert set(trainable) == {"projector", "decoder"} and set(trainable["decoder"]) == {"layers"}
    assert set(frozen) == {"decoder"} and set(frozen["decoder"]) == {"embed_tokens"}
    joined = merge_params(trainable, frozen)
    assert jax.tree.structure(joined) == jax.tree.structure(params)
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (joined, params)), strict=True))


def test_a_group_is_a_path_and_no_mere_prefix_of_a_name():
    groups = {"decoder": 1.0, "decoder/layers/mlp": 2.0}
    assert group_of(("decoder", "layers", "mlp", "kernel"), groups) == "decoder/layers/mlp"
    assert group_of(("decoder", "layers", "mlp2", "kernel"), groups) == "decoder"
    assert group_of(("decoder_head", "kernel"), groups) is None


def test_a_group_without_parameters_is_an_error_that_names_what_there_is():
    with pytest.raises(LlavaError, match=r"\['projecter'\].*the model has \['decoder', 'proj"):
        split_params(draw(), {"projecter": 1e-3, "decoder": 1e-3})
    with pytest.raises(LlavaError, match="sub-trees, such as projector/linear_0$"):
        split_params(draw(), {"projector/linear0": 1e-3})


def test_the_state_holds_moments_of_the_trainable_tree_alone():
    trainable, _ = split_params(draw(), {"projector": 1.0})
    state = adamw({"projector": 1.0}, lambda step: 1.0, **OPTIONS).init(trainable)
    arrays = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert sorted(leaf.shape for leaf in arrays) == [(4, 5), (4, 5), (5,), (5,)]


def test_stochastic_rounding_gives_a_neighbour_and_keeps_the_mean():
    x = jnp.array([1.0, 1.001, -3.3e-9, 0.0, 3.3e30, -1.0039])
    draws = jax.vmap(lambda key: round_stochastically(x, key))(
        jax.random.split(jax.random.key(0), 4000)
    ).astype(jnp.float32)
    assert bool((abs(draws - x) < abs(x) / 128 + 1e-12).all())
    assert bool((draws[:, jnp.array([0, 3])] == x[jnp.array([0, 3])]).all())  # already bfloat16
    np.testing.assert_allclose(draws.mean(axis=0), x, rtol=3e-4)


@pytest.mark.parametrize("b2", [0.98, 0.999])
def test_bfloat16_moments_follow_float32_ones(b2):
    """Also where gradients shrink: rounded to nearest, the second moment would never fall."""
    params = draw()
    gradients = [draw() for _ in range(20)] + [draw(0.1) for _ in range(300)]
    rates = {"projector": 1e-3, "decoder": 1e-3}
    moved = []
    for dtype in ("float32", "bfloat16"):
        after = train(rates, lambda step: 1.0, gradients, params, b2=b2, moments_dtype=dtype)
        moved.append(jax.tree.leaves(jax.tree.map(jnp.subtract, after, params)))
    for a, b in zip(*moved, strict=True):
        assert float(jnp.linalg.norm(a - b) / jnp.linalg.norm(a)) < 0.02


def test_bfloat16_moments_take_half_the_memory_and_are_the_same_in_every_run():
    optimizer = adamw({"projector": 1e-2}, lambda step: 1.0, **OPTIONS, moments_dtype="bfloat16")
    trainable, _ = split_params(draw(), {"projector": 1.0})
    update = jax.jit(optimizer.update)
    (_, state), (_, again) = (
        update(trainable, optimizer.init(trainable), trainable) for _ in range(2)
    )
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert {leaf.dtype for leaf in moments} == {jnp.dtype(jnp.bfloat16)}
    jax.tree.map(np.testing.assert_array_equal, state, again)
