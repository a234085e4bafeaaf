"""Image features in the places of placeholder ids."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from llava_jax.models.decoder import Decoder
from llava_jax.models.llava import (
    IMAGE_TOKEN_ID,
    LlavaModel,
    image_token_count,
    merge_image_features,
    normalize_images,
)
from tests.tiny_model import CONFIG, random_params

RNG = np.random.default_rng(0)
P = 4  # tokens an image


@functools.partial(jax.jit, static_argnames="config")
def embed(params, ids, images, config=CONFIG):
    return LlavaModel(config).apply({"params": params}, ids, images, method=LlavaModel.embed)


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


def test_the_kth_placeholder_of_a_row_takes_its_kth_feature():
    is_image = np.array([[0, 1, 1, 0, 1, 1], [0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0]], bool)
    features = jnp.arange(12.0).reshape(3, 4, 1) + 100
    merged = merge_image_features(-jnp.ones((3, 6, 1)), features, is_image)
    wanted = [[-1, 100, 101, -1, 102, 103], [-1] * 6, [108, 109, -1, -1, -1, -1]]
    np.testing.assert_array_equal(merged[..., 0], wanted)


def test_images_stand_in_their_order_beside_text_that_is_untouched():
    params = random_params(CONFIG)
    ids = np.stack([ids_with(14, 1, 8), ids_with(14), ids_with(14, 5)])
    images = pictures(3, 2)
    found = np.asarray(embed(params, ids, images))
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
    np.testing.assert_array_equal(embed(params, ids, images), embed(params, ids, other))


def test_a_text_only_row_is_the_decoder_alone():
    params, ids = random_params(CONFIG), ids_with(10)[None]
    positions, segments = np.arange(10)[None], np.ones((1, 10), int)

    @jax.jit
    def both(params, images):
        def text(decoder, ids):
            return decoder(decoder.embed(ids), positions, segments)

        alone = Decoder(CONFIG.decoder).apply({"params": params["decoder"]}, ids, method=text)
        whole = LlavaModel(CONFIG).apply({"params": params}, ids, images, positions, segments)
        bare = LlavaModel(CONFIG).apply({"params": params}, ids, None, positions, segments)
        return alone, whole, bare

    alone, whole, bare = both(params, pictures(1, 1))
    np.testing.assert_allclose(whole, alone, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(bare, alone, rtol=1e-6, atol=1e-6)


def test_the_embedding_of_id_0_gets_no_gradient_from_placeholders():
    """Placeholders are looked up as id 0 and then replaced: it must not learn from that."""
    params, ids = random_params(CONFIG), np.where(ids_with(10, 2) == 0, 1, ids_with(10, 2))[None]
    ids[0, 2:6] = IMAGE_TOKEN_ID
    weights = RNG.normal(size=(1, 10, 32)).astype(np.float32)
    images = pictures(1, 1)
    grads = jax.jit(jax.grad(lambda p: jnp.sum(embed(p, ids, images) * weights)))(params)
    table = grads["decoder"]["embed_tokens"]["embedding"]
    assert not table[0].any() and table[ids[0, 0]].any()
    assert abs(grads["projector"]["linear_0"]["kernel"]).max() > 0


def test_pixels_are_normalised_by_the_encoders_mean_and_deviation():
    image = pictures(1)
    wanted = (image / 255.0 - CONFIG.image_mean) / CONFIG.image_std
    np.testing.assert_allclose(normalize_images(CONFIG, image), wanted, rtol=1e-5, atol=1e-5)


def test_tokens_an_image_takes():
    bare = dataclasses.replace(CONFIG, vision=dataclasses.replace(CONFIG.vision, class_token=False))
    assert image_token_count(CONFIG) == P
    assert image_token_count(dataclasses.replace(CONFIG, keep_class_token=True)) == P + 1
    assert image_token_count(dataclasses.replace(bare, keep_class_token=True)) == P
    assert image_token_count(dataclasses.replace(CONFIG, image_size=11)) == P


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
        assert shapes.shape == (1, image_token_count(config), 32)
