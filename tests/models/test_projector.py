"""Kinds of projector, their initialisation and their activation, against torch."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from llava_jax.models.projector import Projector, ProjectorSpec, fold_squares

FEATURES = np.random.default_rng(0).normal(size=(2, 5, 100)).astype(np.float32)


def init(kind, features=64, **options):
    model = Projector(kind, features, **options)
    return model, nn.meta.unbox(model.init(jax.random.key(0), FEATURES))


@pytest.mark.parametrize(
    "kind, depth",
    [("identity", 0), ("linear", 1), ("mlp1x_gelu", 1), ("mlp2x_gelu", 2), ("mlp13x_gelu", 13)],
)
def test_depth_of_each_kind(kind, depth):
    assert ProjectorSpec.parse(kind).depth == depth
    _, variables = init(kind) if depth < 3 else (None, {"params": {}})
    if depth < 3:
        assert len(variables.get("params", {})) == depth


@pytest.mark.parametrize(
    "kind",
    [
        *("mlp0x_gelu", "mlpx_gelu", "mlp2x_relu", "mlp2x_gelu2", "", "M"),
        *("pixel_shuffle1_mlp2x_gelu", "pixel_shuffle2_linear", "pixel_shuffle_mlp2x_gelu"),
    ],
)
def test_an_unknown_kind_names_the_choices(kind):
    with pytest.raises(ValueError, match=f"unknown projector '{kind}': choose linear, identity"):
        ProjectorSpec.parse(kind)


def test_identity_changes_nothing():
    model, variables = init("identity")
    np.testing.assert_array_equal(model.apply(variables, FEATURES), FEATURES)


def test_initialisation_is_that_of_torch():
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)), kernel and bias alike, fan_in of each layer."""
    _, variables = init("mlp2x_gelu", features=400)
    for i, fan_in in enumerate((100, 400)):
        bound = fan_in**-0.5
        for name, leaf in variables["params"][f"linear_{i}"].items():
            assert abs(leaf).max() <= bound, (i, name)
            assert abs(leaf).max() > 0.95 * bound, (i, name)
            assert abs(float(leaf.std()) - bound / 3**0.5) < 0.1 * bound, (i, name)


def test_values_are_those_of_torch_with_exact_gelu():
    torch = pytest.importorskip("torch")
    model, variables = init("mlp3x_gelu")
    layers = []
    for i, size in enumerate((100, 64, 64)):
        linear = torch.nn.Linear(size, 64)
        layer = variables["params"][f"linear_{i}"]
        # Large weights, so that the tanh approximation of GELU would show.
        kernel = np.array(layer["kernel"]) * 4
        variables["params"][f"linear_{i}"]["kernel"] = kernel
        linear.weight.data, linear.bias.data = torch.tensor(kernel.T), torch.tensor(layer["bias"])
        layers += [torch.nn.GELU(), linear] if i else [linear]
    wanted = torch.nn.Sequential(*layers)(torch.tensor(FEATURES)).detach()
    np.testing.assert_allclose(model.apply(variables, FEATURES), wanted, rtol=1e-5, atol=1e-4)


def test_a_projector_without_bias():
    _, variables = init("mlp2x_gelu", use_bias=False)
    assert {tuple(layer) for layer in variables["params"].values()} == {("kernel",)}


SHUFFLE = "pixel_shuffle2_mlp2x_gelu"


def test_squares_are_folded_row_by_row():
    """The drawing of `fold_squares`: a 4 x 4 grid of features of one channel, a = 0, b = 1, …"""
    grid = np.arange(16.0).reshape(1, 16, 1)
    folded = np.asarray(fold_squares(grid, 2))
    wanted = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    np.testing.assert_array_equal(folded[0], wanted)


def test_channels_of_a_feature_stay_together():
    grid = np.arange(2 * 9 * 9 * 5.0).reshape(2, 81, 5)
    folded = np.asarray(fold_squares(grid, 3))
    assert folded.shape == (2, 9, 45)
    # Square (1, 2) begins at row 3, column 6; its feature (2, 1) is the eighth.
    np.testing.assert_array_equal(folded[1, 5, 35:40], grid[1, (3 + 2) * 9 + 6 + 1])


def test_a_pixel_shuffle_is_torch_unshuffle_and_an_mlp():
    """torch.nn.PixelUnshuffle orders channels (C, r, r); ours are (r, r, C)."""
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(1).normal(size=(2, 16, 6)).astype(np.float32)
    model = Projector(SHUFFLE, 10)
    variables = nn.meta.unbox(model.init(jax.random.key(0), x))
    grid = torch.tensor(x).reshape(2, 4, 4, 6).permute(0, 3, 1, 2)
    folded = torch.nn.functional.pixel_unshuffle(grid, 2)  # [2, 6 * 4, 2, 2]
    folded = folded.reshape(2, 6, 4, 4).permute(0, 3, 2, 1).reshape(2, 4, 24)
    for i, (into, out) in enumerate(ProjectorSpec.parse(SHUFFLE).layer_sizes(6, 10)):
        layer = variables["params"][f"linear_{i}"]
        assert layer["kernel"].shape == (into, out)
        folded = torch.nn.functional.gelu(folded) if i else folded
        folded = folded @ torch.tensor(np.array(layer["kernel"])) + torch.tensor(
            np.array(layer["bias"])
        )
    np.testing.assert_allclose(model.apply(variables, x), folded, rtol=1e-5, atol=1e-5)


def test_gradients_reach_every_feature_of_a_square():
    model = Projector(SHUFFLE, 8)
    x = np.random.default_rng(2).normal(size=(1, 16, 6)).astype(np.float32)
    variables = nn.meta.unbox(model.init(jax.random.key(0), x))
    one = lambda x: model.apply(variables, x)[0, 1].sum()  # the top right square
    moved = np.abs(np.asarray(jax.grad(one)(x))).sum(-1)[0].reshape(4, 4) > 0
    np.testing.assert_array_equal(np.argwhere(moved).tolist(), [[0, 2], [0, 3], [1, 2], [1, 3]])


@pytest.mark.parametrize("kind, tokens", [(SHUFFLE, 9), ("pixel_shuffle3_mlp1x_gelu", 4)])
def test_tokens_of_a_fold(kind, tokens):
    spec = ProjectorSpec.parse(kind)
    assert spec.tokens(36) == tokens
    assert spec.flops(36, 6, 10) == 2 * tokens * sum(i * o for i, o in spec.layer_sizes(6, 10))


@pytest.mark.parametrize("features, words", [(9, "3 x 3"), (17, "has 17"), (15, "has 15")])
def test_a_grid_that_cannot_be_folded(features, words):
    with pytest.raises(ValueError, match=f"folds squares of 2 x 2 .*{words}"):
        ProjectorSpec.parse(SHUFFLE).tokens(features)


def test_identity_needs_equal_widths():
    ProjectorSpec.parse("identity").check(8, 8)
    with pytest.raises(ValueError, match="image features are 8 wide"):
        ProjectorSpec.parse("identity").check(8, 16)
