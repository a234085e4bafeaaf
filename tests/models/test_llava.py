"""Image features in the places of placeholder ids."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax.data.rows import feature_places
from llava_jax.models.anyres import Tiling
from llava_jax.models.decoder import Decoder
from llava_jax.models.images import ImageSpec
from llava_jax.models.llava import (
    IMAGE_TOKEN_ID,
    LlavaModel,
    fresh_projector,
    init_params,
    normalize_images,
)
from tests.tiny_model import CONFIG, features_of, random_params

RNG = np.random.default_rng(0)
P = 4  # tokens an image


@functools.partial(jax.jit, static_argnames="config")
def embed(params, ids, tiles, feature_ids, feature_places, config=CONFIG):
    def run(model):
        features = model.encode_images(tiles.reshape(-1, 8, 8, 3)).reshape(len(ids), -1, 32)
        return model.embed(ids, features, feature_ids, feature_places)

    return LlavaModel(config).apply({"params": params}, method=run)


@jax.jit
def encode(params, images):
    return LlavaModel(CONFIG).apply({"params": params}, images, method=LlavaModel.encode_images)


def pictures(*shape) -> np.ndarray:
    return RNG.integers(0, 256, (*shape, 8, 8, 3)).astype(np.uint8)


def ids_with(length: int, *starts: int) -> np.ndarray:
    """[length] ids with an image's placeholders at each start."""
    ids = RNG.integers(0, 290, length)
    for start in starts:
        ids[start : start + P] = IMAGE_TOKEN_ID
    return ids


def test_each_position_shows_the_feature_of_its_id():
    params, ids = random_params(CONFIG), RNG.integers(0, 290, (3, 6))
    feature_ids = np.array([[-1, 2, 0, -1, 3, 1], [-1] * 6, [1, 0, -1, -1, -1, -1]])
    features = RNG.normal(size=(3, 4, 32)).astype(np.float32)
    places = np.stack([feature_places(row, 4) for row in feature_ids])
    assert places.tolist() == [[2, 5, 1, 4], [-1] * 4, [1, 0, -1, -1]]
    model = LlavaModel(CONFIG)
    for inverse in (places, None):
        run = lambda model, inverse=inverse: model.embed(ids, features, feature_ids, inverse)
        found = np.asarray(model.apply({"params": params}, method=run))
        for row, position in np.ndindex(ids.shape):
            feature = feature_ids[row, position]
            wanted = params["decoder"]["embed_tokens"]["embedding"][ids[row, position]]
            wanted = wanted if feature < 0 else features[row, feature]
            np.testing.assert_array_equal(found[row, position], wanted)


def test_a_flat_batch_takes_features_like_rows():
    """As prefill has it: prompts one after the other, features of a store."""
    params, ids = random_params(CONFIG), ids_with(14, 1, 8)
    features = RNG.normal(size=(20, 32)).astype(np.float32)
    feature_ids = np.where(ids == IMAGE_TOKEN_ID, np.arange(14) + 3, -1)
    model = LlavaModel(CONFIG)
    flat = model.apply({"params": params}, ids, features, feature_ids, method=LlavaModel.embed)
    arrays = (x[None] for x in (ids, features, feature_ids))
    row = model.apply({"params": params}, *arrays, method=LlavaModel.embed)
    np.testing.assert_array_equal(flat, row[0])


def test_images_stand_in_their_order_beside_text_that_is_untouched():
    params = random_params(CONFIG)
    ids = np.stack([ids_with(14, 1, 8), ids_with(14), ids_with(14, 5)])
    images = pictures(3, 2)
    found = np.asarray(embed(params, ids, images, **features_of(ids, 2)))
    features = np.asarray(encode(params, images.reshape(-1, 8, 8, 3))).reshape(3, 2, P, 32)
    table = np.asarray(params["decoder"]["embed_tokens"]["embedding"])
    wanted = table[np.where(ids == IMAGE_TOKEN_ID, 0, ids)]
    wanted[0, 1:5], wanted[0, 8:12], wanted[2, 5:9] = features[0, 0], features[0, 1], features[2, 0]
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_unused_image_slots_change_nothing():
    params, ids = random_params(CONFIG), np.stack([ids_with(10, 2), ids_with(10)])
    images = pictures(2, 2)
    other = images.copy()
    other[0, 1], other[1] = 7, 9
    features = features_of(ids, 2)
    before, after = (embed(params, ids, pixels, **features) for pixels in (images, other))
    np.testing.assert_array_equal(before, after)


def test_a_text_only_row_is_the_decoder_alone():
    params, ids = random_params(CONFIG), ids_with(10)[None]
    positions, segments = np.arange(10)[None], np.ones((1, 10), int)

    @jax.jit
    def both(params, images):
        def text(decoder, ids):
            return decoder(decoder.embed(ids), positions, segments)

        alone = Decoder(CONFIG.decoder).apply({"params": params["decoder"]}, ids, method=text)
        features = features_of(ids, 1).values()
        none = images[:, :0]
        return alone, *(
            LlavaModel(CONFIG).apply(
                {"params": params}, ids, pixels, *features, positions, segments
            )
            for pixels in (images, None, none)
        )

    alone, *others = both(params, pictures(1, 1))
    for found in others:
        np.testing.assert_allclose(found, alone, rtol=1e-6, atol=1e-6)


def test_the_embedding_of_id_0_gets_no_gradient_from_placeholders():
    """Placeholders are looked up as id 0 and then replaced: it must not learn from that."""
    params, ids = random_params(CONFIG), np.where(ids_with(10, 2) == 0, 1, ids_with(10, 2))[None]
    ids[0, 2:6] = IMAGE_TOKEN_ID
    weights = RNG.normal(size=(1, 10, 32)).astype(np.float32)
    images, features = pictures(1, 1), features_of(ids, 1)
    grads = jax.jit(jax.grad(lambda p: jnp.sum(embed(p, ids, images, **features) * weights)))(
        params
    )
    table = grads["decoder"]["embed_tokens"]["embedding"]
    assert not table[0].any() and table[ids[0, 0]].any()
    assert abs(grads["projector"]["linear_0"]["kernel"]).max() > 0


def test_pixels_are_normalised_by_the_encoders_mean_and_deviation():
    image = pictures(1)
    wanted = (image / 255.0 - CONFIG.image.mean) / CONFIG.image.std
    np.testing.assert_allclose(normalize_images(CONFIG.image, image), wanted, rtol=1e-5, atol=1e-5)


def test_tokens_an_image_takes():
    bare = dataclasses.replace(CONFIG, vision=dataclasses.replace(CONFIG.vision, class_token=False))
    assert CONFIG.tokens_per_tile == P
    assert dataclasses.replace(CONFIG, keep_class_token=True).tokens_per_tile == P + 1
    assert dataclasses.replace(bare, keep_class_token=True).tokens_per_tile == P
    assert dataclasses.replace(CONFIG, image=ImageSpec(11)).tokens_per_tile == P


def test_the_model_gives_as_many_features_as_the_data_makes_placeholders():
    for keep in (True, False):
        config = dataclasses.replace(CONFIG, keep_class_token=keep)
        shapes = jax.eval_shape(
            lambda p, x, c=config: LlavaModel(c).apply(
                {"params": p}, x, method=LlavaModel.encode_images
            ),
            random_params(config),
            pictures(1),
        )
        assert shapes.shape == (1, config.tokens_per_tile, 32)


def test_a_model_whose_rows_are_attended_to_in_blocks_learns_the_same():
    """Packed rows of 512 tokens; the tower sees tile by tile; some activations are made again."""
    params, ids = random_params(CONFIG), ids_with(512, 3, 300)
    feature_ids = np.where(ids == IMAGE_TOKEN_ID, np.cumsum(ids == IMAGE_TOKEN_ID) - 1, -1)[None]
    segments = np.repeat([1, 2], [200, 312])[None]
    positions = np.r_[np.arange(200), np.arange(312)][None]
    tiles = pictures(2)

    def loss(params, attention, policy):
        def run(model):
            features = model.encode_images(tiles).reshape(1, -1, 32)
            seen = model.embed(ids[None], features, feature_ids, None)
            return jnp.mean(model.decoder(seen, positions, segments) ** 2)

        model = LlavaModel(CONFIG, attention=attention, remat_policy=policy)
        return model.apply({"params": params}, method=run)

    graded = jax.jit(jax.value_and_grad(loss), static_argnums=(1, 2))
    wanted, found = graded(params, "xla", "none"), graded(params, "blocks", "attention")
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found[1], wanted[1])


@pytest.mark.parametrize("kind", ["linear", "pixel_shuffle2_mlp2x_gelu"])
def test_a_fresh_projector_is_that_of_a_fresh_model(kind):
    newline = dataclasses.replace(CONFIG.image, mode="anyres", tiling=Tiling(((1, 2),)))
    config, key = dataclasses.replace(CONFIG, projector=kind, image=newline), jax.random.key(3)
    drawn = lambda: (fresh_projector(config, key), init_params(config, key)["projector"])
    found, wanted = nn.meta.unbox(jax.jit(drawn)())
    assert "newline" in wanted
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
