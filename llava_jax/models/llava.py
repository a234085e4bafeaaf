"""LLaVA: image features put in the places of placeholder ids, then the language model.

B rows, T length, I images a row, S image side, P tokens an image, D model size, V vocabulary.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from llava_jax.models.decoder import Decoder, DecoderConfig
from llava_jax.models.gathering import front_order, take_rows
from llava_jax.models.projector import Projector, ProjectorSpec
from llava_jax.models.vit import ViT, ViTConfig, feature_states

IMAGE_TOKEN_ID = -200  # IMAGE_TOKEN_INDEX of the original LLaVA: in no vocabulary
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class LlavaConfig:
    """A vision encoder, a projector and a decoder, and how pictures become tokens.

    Attributes:
      projector: a kind of `ProjectorSpec`, such as `mlp2x_gelu`.
      feature_layer: which of the encoder's hidden states is used (mm_vision_select_layer); several
        are concatenated.
      keep_class_token: `cls_patch` of LLaVA, `full` of Hugging Face.
      drop_first_patch: Hugging Face's `default` drops the first feature of an encoder without
        class token too.
      image_size: side in pixels of the square the encoder is given.
      image_token_id: the id that stands for one image feature in `input_ids`.
      image_mode: `square` (resize shortest edge, centre crop), `pad` (to a square of the mean
        colour first) or `resize` (straight to the square).
      use_im_start_end: wrap each image in <im_start> and <im_end> tokens (LLaVA v1 option).
    """

    vision: ViTConfig
    decoder: DecoderConfig
    projector: str = "mlp2x_gelu"
    projector_bias: bool = True
    feature_layer: int | tuple[int, ...] = -2
    keep_class_token: bool = False
    drop_first_patch: bool = False
    image_size: int = 336
    image_token_id: int = IMAGE_TOKEN_ID
    image_mean: tuple[float, float, float] = CLIP_MEAN
    image_std: tuple[float, float, float] = CLIP_STD
    image_mode: str = "pad"
    use_im_start_end: bool = False

    @property
    def feature_size(self) -> int:
        """Width of an image feature as the projector gets it."""
        return self.vision.hidden_size * len(feature_states(self.vision, self.feature_layer))


def image_token_count(config: LlavaConfig) -> int:
    """Placeholder ids that one image takes: the data pipeline and the model both ask here."""
    patches = (config.image_size // config.vision.patch_size) ** 2
    class_token = config.keep_class_token and config.vision.class_token
    features = patches + int(class_token) - int(config.drop_first_patch)
    return ProjectorSpec.parse(config.projector).tokens(features)


def normalize_images(config: LlavaConfig, images: jax.Array) -> jax.Array:
    """uint8 [..., S, S, 3] -> float32, less the encoder's mean, over its deviation."""
    mean, std = jnp.array(config.image_mean), jnp.array(config.image_std)
    return (images.astype(jnp.float32) / 255 - mean) / std


def merge_image_features(embeddings: jax.Array, features: jax.Array, is_image: jax.Array):
    """Replaces the k-th placeholder of each row by the row's k-th image feature.

    A gather within the row, so a sharded batch needs no communication. The host guarantees that a
    row has no more placeholders than features.

    Args:
      embeddings: [B, T, D].
      features: [B, I * P, D], images in the order of their placeholders.
      is_image: bool[B, T].
    """
    order, rank = front_order(is_image)
    count = features.shape[1]
    order = jnp.pad(order, ((0, 0), (0, max(count - order.shape[1], 0))))[:, :count]
    taken = jnp.arange(count) < jnp.sum(is_image, axis=1, keepdims=True)
    gathered = take_rows(features, jnp.where(is_image, rank, 0), order, taken)
    return jnp.where(is_image[..., None], gathered.astype(embeddings.dtype), embeddings)


class LlavaModel(nn.Module):
    """Vision encoder, projector and decoder as one module; parameters under those three names.

    Attributes:
      dtype: compute dtype; parameters keep their own.
      remat_policy, attention, stacked: see Decoder.
    """

    config: LlavaConfig
    dtype: jnp.dtype = jnp.float32
    remat_policy: str = "none"
    attention: str = "xla"
    stacked: bool = True

    def setup(self):
        c = self.config
        self.vision = ViT(c.vision, c.feature_layer, c.keep_class_token, self.dtype)
        self.projector = Projector(c.projector, c.decoder.hidden_size, c.projector_bias, self.dtype)
        self.decoder = Decoder(
            c.decoder, self.dtype, self.remat_policy, self.attention, self.stacked
        )

    def encode_images(self, images: jax.Array) -> jax.Array:
        """Pixels [B, S, S, 3], uint8 or already normalised floats -> tokens [B, P, D]."""
        with jax.named_scope("vision"):
            if images.dtype == jnp.uint8:
                images = normalize_images(self.config, images)
            features = self.vision(images)
            return self.projector(features[:, 1:] if self.config.drop_first_patch else features)

    def embed(self, input_ids: jax.Array, images: jax.Array | None) -> jax.Array:
        """Token embeddings [B, T, D], the features of images [B, I, S, S, 3] in their places."""
        is_image = input_ids == self.config.image_token_id
        embeddings = self.decoder.embed(jnp.maximum(input_ids, 0))  # -200 is in no table
        if images is None:
            return embeddings
        features = self.encode_images(images.reshape(-1, *images.shape[2:]))
        features = features.reshape(len(input_ids), -1, features.shape[-1])  # [B, I * P, D]
        return merge_image_features(embeddings, features, is_image)

    def __call__(
        self,
        input_ids: jax.Array,
        images: jax.Array | None,
        position_ids: jax.Array,
        segment_ids: jax.Array,
        turn_ids: jax.Array | None = None,
    ) -> jax.Array:
        """Final hidden states [B, T, D]; arguments as in `Decoder`, ids int[B, T]."""
        embeddings = self.embed(input_ids, images)
        return self.decoder(embeddings, position_ids, segment_ids, turn_ids)

    def attend(self, hidden_states: jax.Array) -> jax.Array:
        """[..., D] -> float32 logits [..., V]."""
        return self.decoder.attend(hidden_states)


def init_params(config: LlavaConfig, key: jax.Array) -> dict:
    """Fresh parameters of the whole model, leaves boxed with their logical axis names."""
    ids = jnp.zeros((1, 1), jnp.int32)
    images = jnp.zeros((1, 1, config.image_size, config.image_size, 3), jnp.uint8)
    model = LlavaModel(config)
    return model.init(key, ids, images, ids, ids, method=_touch_all)["params"]


def _touch_all(model: LlavaModel, input_ids, images, position_ids, segment_ids):
    return model.attend(model(input_ids, images, position_ids, segment_ids))


@functools.cache  # a trace of the whole model: a second and more, and many ask
def abstract_params(config: LlavaConfig) -> dict:
    """Shapes and logical axes of `init_params` without computing anything; to be read only."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
