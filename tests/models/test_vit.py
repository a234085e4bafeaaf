"""Which blocks exist and run, what happens to the class token, and resized positions."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax.models.vit import ViT, num_blocks, resize_matrix, resize_positions
from tests.jaxprs import equations
from tests.tiny_model import CONFIG, VISION, random_params

PIXELS = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)


def draw(config=VISION, feature_layer=-2) -> dict:
    whole = dataclasses.replace(CONFIG, vision=config, feature_layer=feature_layer)
    return random_params(whole)["vision"]


@functools.partial(jax.jit, static_argnames=("feature_layer", "config", "keep_class_token"))
def features(params, pixels, feature_layer=-2, config=VISION, keep_class_token=False):
    return ViT(config, feature_layer, keep_class_token).apply({"params": params}, pixels)


@pytest.mark.parametrize("layer, blocks", [(0, 0), (1, 1), (24, 24), (-1, 24), (-2, 23), (-25, 0)])
def test_blocks_for_a_feature_layer(layer, blocks):
    assert num_blocks(dataclasses.replace(VISION, num_layers=24), layer) == blocks


@pytest.mark.parametrize("layer", [25, -26])
def test_a_feature_layer_that_does_not_exist(layer):
    with pytest.raises(ValueError, match=f"feature_layer {layer} .* from -25 to 24"):
        num_blocks(dataclasses.replace(VISION, num_layers=24), layer)


@pytest.mark.parametrize("layer, blocks", [(-1, 3), (-2, 2), (1, 1), (0, 0)])
def test_blocks_past_the_layer_neither_exist_nor_run(layer, blocks):
    shapes = draw(feature_layer=layer)
    depths = {leaf.shape[0] for leaf in jax.tree.leaves(shapes.get("layers", {}))}
    assert depths == ({blocks} if blocks else set())
    traced = jax.make_jaxpr(lambda p: features(p, PIXELS, layer))(shapes)
    scans = equations(traced, "scan")
    assert [eqn.params["length"] for eqn in scans] == ([blocks] if blocks else [])


def test_a_deeper_layer_is_more_blocks_of_the_same_encoder():
    """Layer 1 does with the first block of the stack what layer 2 did with it."""
    params = draw(feature_layer=2)
    blocks = params["layers"]
    first, second = (jax.tree.map(lambda x, i=i: x[i : i + 1], blocks) for i in (0, 1))
    # Branches of the second block switched off, layer 2 is layer 1.
    off = {name: jnp.zeros_like(second[name]) for name in ("layer_scale1", "layer_scale2")}
    stacked = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, second | off)
    shallow = features(params | {"layers": first}, PIXELS, 1)
    np.testing.assert_allclose(
        features(params | {"layers": stacked}, PIXELS, 2), shallow, rtol=1e-6, atol=1e-6
    )
    assert not np.allclose(features(params, PIXELS, 2), shallow, atol=1e-2)


def test_the_class_token_is_kept_in_front_or_dropped_and_takes_part():
    params = draw()
    kept = features(params, PIXELS, keep_class_token=True)
    assert kept.shape == (2, 17, 16)
    np.testing.assert_allclose(kept[:, 1:], features(params, PIXELS), rtol=1e-6, atol=1e-6)
    changed = params | {"class_embed": jnp.full((16,), 3.0)}
    assert not np.allclose(features(changed, PIXELS), features(params, PIXELS), atol=1e-3)


def test_without_a_class_token_there_is_none_to_keep():
    bare = dataclasses.replace(VISION, class_token=False)
    params = draw(bare)
    assert "class_embed" not in params
    assert features(params, PIXELS, config=bare, keep_class_token=True).shape == (2, 16, 16)


@pytest.mark.parametrize("old, new", [(37, 4), (37, 16), (5, 9), (4, 3), (6, 6)])
def test_positions_are_resized_as_torch_does(old, new):
    torch = pytest.importorskip("torch")
    grid = np.random.default_rng(0).normal(size=(old * old, 5)).astype(np.float32)
    wanted = torch.nn.functional.interpolate(
        torch.tensor(grid).reshape(1, old, old, 5).permute(0, 3, 1, 2),
        size=(new, new + 1),
        mode="bicubic",
        align_corners=False,
    )
    wanted = wanted.permute(0, 2, 3, 1).reshape(new * (new + 1), 5)
    np.testing.assert_allclose(resize_positions(grid, new, new + 1), wanted, atol=5e-5)


def test_positions_of_the_stored_size_are_untouched():
    grid = jnp.arange(32.0).reshape(16, 2)
    assert resize_positions(grid, 4, 4) is grid
    np.testing.assert_array_equal(resize_matrix(5, 5), np.eye(5))
    np.testing.assert_allclose(resize_matrix(7, 3).sum(axis=1), 1, atol=1e-6)


def test_patches_are_read_row_by_row_and_what_does_not_fill_one_is_cut():
    """With everything else switched off, the features are the patches in reading order."""
    config = dataclasses.replace(VISION, hidden_size=48, class_token=False, num_layers=1)
    params = draw(config, 0)
    params["position_embed"] = jnp.zeros_like(params["position_embed"])
    params["patch_embed"] = {"kernel": jnp.eye(48), "bias": jnp.zeros(48)}
    pixels = np.arange(math.prod((1, 18, 17, 3)), dtype=np.float32).reshape(1, 18, 17, 3)
    found = features(params, pixels, 0, config)
    wanted = [
        pixels[0, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].reshape(-1)
        for row in range(4)
        for column in range(4)
    ]
    np.testing.assert_array_equal(found[0], wanted)


@pytest.mark.parametrize("policy", ["linear", "attention", "full"])
def test_remat_computes_blocks_again_and_changes_no_gradient(policy):
    @functools.partial(jax.jit, static_argnames="policy")
    def grads(params, policy):
        encoder = ViT(VISION, -2, remat_policy=policy)
        return jax.grad(lambda p: jnp.sum(encoder.apply({"params": p}, PIXELS) ** 2))(params)

    params = draw()
    products = lambda policy: grads.lower(params, policy).as_text().count("stablehlo.dot_general ")
    assert products(policy) > products("none")
    again, plain = (jax.tree.leaves(grads(params, p)) for p in (policy, "none"))
    largest = max(float(abs(leaf).max()) for leaf in plain)
    for a, b in zip(again, plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * largest)
