"""Rows and the one schema of a batch."""

import dataclasses

import numpy as np
import pytest

from llava_jax.data.rows import RowFormat, batch_spec, feature_places, pack
from llava_jax.errors import LlavaError
from llava_jax.models.images import ImageSpec, Layout
from llava_jax.text.templates import get_template
from llava_jax.text.tokenization import TokenRow

FORMAT = RowFormat(get_template("v1"), ImageSpec(2), tokens_per_tile=2, max_length=9, tiles=4)


def row(ids, spans=()):
    ids = np.array(ids, np.int32)
    return TokenRow(ids, ids * 10, spans, np.zeros((len(ids), 2), np.int64))


def picture(*values, features=(0, 1)):
    """A picture of a tile for each of `values`."""
    tiles = np.stack([np.full((2, 2, 3), value, np.uint8) for value in values])
    return Layout(len(values), np.array(features, np.int32)), tiles


def test_pack():
    rows = [row([1, -200, -200, -200, 2], ((1, 3), (3, 4))), row([3]), row([-200], ((0, 1),))]
    pictures = [picture(7), picture(8, 9, features=[2]), picture(5, features=[1])]
    result = pack(rows, pictures, FORMAT)
    assert result["input_ids"].tolist() == [1, -200, -200, -200, 2, 3, -200, 0, 0]
    assert result["labels"].tolist() == [10, -2000, -2000, -2000, 20, 30, -2000, -100, -100]
    assert result["position_ids"].tolist() == [0, 1, 2, 3, 4, 0, 0, 0, 0]
    assert result["segment_ids"].tolist() == [1, 1, 1, 1, 1, 2, 3, 0, 0]
    assert result["feature_ids"].tolist() == [-1, 0, 1, 4, -1, -1, 7, -1, -1]
    assert result["feature_places"].tolist() == [1, 2, -1, -1, 3, -1, -1, 6]
    assert result["tiles"][:, 0, 0, 0].tolist() == [7, 8, 9, 5]


def test_an_empty_row_is_all_padding():
    result = pack([], [], FORMAT)
    assert not result["segment_ids"].any() and (result["labels"] == -100).all()
    assert (result["feature_ids"] == -1).all() and (result["feature_places"] == -1).all()


@pytest.mark.parametrize("changes", [{}, {"turns": "independent"}, {"tiles": 0}])
def test_a_row_has_the_shapes_of_the_schema(changes):
    row_format = dataclasses.replace(FORMAT, **changes)
    spec = batch_spec(row_format, 3)
    arrays = pack([row([3])], [], row_format)
    assert {name: ((3, *a.shape), a.dtype) for name, a in arrays.items()} == {
        name: (array.shape, array.dtype) for name, array in spec.items()
    }
    assert ("turn_ids" in spec) == bool(changes.get("turns"))


@pytest.mark.parametrize(
    ("changes", "pictures"),
    [
        ({"max_length": 2}, [picture(7)]),
        ({"tiles": 0}, [picture(7)]),
        ({}, []),
        ({}, [picture(7, features=[0])]),
        ({}, [picture(7), picture(8)]),
    ],
)
def test_pack_refuses_what_does_not_fit(changes, pictures):
    with pytest.raises(ValueError):
        pack([row([1, -200, -200], ((1, 3),))], pictures, dataclasses.replace(FORMAT, **changes))


def test_unknown_turns_are_refused():
    with pytest.raises(LlavaError, match="data.turns is 'each': choose one of conversation"):
        dataclasses.replace(FORMAT, turns="each")


def test_places_are_the_inverse_of_feature_ids():
    rng = np.random.default_rng(0)
    features = rng.permutation(12)[:7]
    ids = np.full(20, -1, np.int32)
    positions = rng.permutation(20)[:7]
    ids[positions] = features
    places = feature_places(ids, 12)
    assert places.dtype == np.int32 and (places >= 0).sum() == 7
    np.testing.assert_array_equal(places[features], positions)
