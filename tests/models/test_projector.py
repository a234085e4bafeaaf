"""Kinds of projector, their initialisation and their activation, against torch."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from llava_jax.models.projector import Projector, projector_depth

FEATURES = np.random.default_rng(0).normal(size=(2, 5, 100)).astype(np.float32)


def init(kind, features=64, **options):
    model = Projector(kind, features, **options)
    return model, nn.meta.unbox(model.init(jax.random.key(0), FEATURES))


@pytest.mark.parametrize(
    "kind, depth",
    [("identity", 0), ("linear", 1), ("mlp1x_gelu", 1), ("mlp2x_gelu", 2), ("mlp13x_gelu", 13)],
)
def test_depth_of_each_kind(kind, depth):
    assert projector_depth(kind) == depth
    _, variables = init(kind) if depth < 3 else (None, {"params": {}})
    if depth < 3:
        assert len(variables.get("params", {})) == depth


@pytest.mark.parametrize("kind", ["mlp0x_gelu", "mlpx_gelu", "mlp2x_relu", "mlp2x_gelu2", "", "M"])
def test_an_unknown_kind_names_the_choices(kind):
    with pytest.raises(ValueError, match=f"unknown projector '{kind}': choose linear, identity or"):
        projector_depth(kind)


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
