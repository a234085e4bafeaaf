"""LLaVA: image features at the positions of placeholder ids, then the language model.

B rows, T length, K tiles in a row, S side of a tile, P features of a tile, D model size, V
vocabulary.
"""

import dataclasses
import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from llava_jax.models.anyres import most_tokens
from llava_jax.models.decoder import Decoder, DecoderConfig
from llava_jax.models.gathering import mix_rows, take_rows
from llava_jax.models.images import (
    IMAGE_TOKEN_ID,
    ImageSpec,
    Layout,
    Source,
    cells_a_side,
    layouts,
)
from llava_jax.models.projector import Projector, ProjectorSpec, average_squares
from llava_jax.models.taps import NEWLINE
from llava_jax.models.vit import ViT, ViTConfig, feature_states, num_blocks


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
      image: how pictures are cut into tiles.
      image_token_id: the id that stands for one image feature in `input_ids`.
      video_token_id: the id that stands for one feature of a video; None if it is the same.
      use_im_start_end: wrap each image in <im_start> and <im_end> tokens (LLaVA v1 option).
    """

    vision: ViTConfig
    decoder: DecoderConfig
    projector: str = "mlp2x_gelu"
    projector_bias: bool = True
    feature_layer: int | tuple[int, ...] = -2
    keep_class_token: bool = False
    drop_first_patch: bool = False
    image: ImageSpec = ImageSpec()
    image_token_id: int = IMAGE_TOKEN_ID
    video_token_id: int | None = None
    use_im_start_end: bool = False

    @property
    def feature_size(self) -> int:
        """Width of an image feature as the projector gets it."""
        return self.vision.hidden_size * len(feature_states(self.vision, self.feature_layer))

    @functools.cached_property
    def tokens_per_tile(self) -> int:
        """P, the features that the projector gives of one tile."""
        side = self.image.size // self.vision.patch_size
        class_token = self.keep_class_token and self.vision.class_token
        features = side**2 + int(class_token) - int(self.drop_first_patch)
        if self.image.pools_in_encoder:
            features += (side // 2) ** 2
        return ProjectorSpec.parse(self.projector).tokens(features)

    @functools.cached_property
    def most_tokens(self) -> int:
        """The tokens that no single picture of a prompt has more of."""
        if self.image.tiling is None:
            return len(self.layouts([(self.image.size, self.image.size)])[0])
        return most_tokens(self.image.tiling, cells_a_side(self.image, self.tokens_per_tile))

    @property
    def image_words(self) -> str:
        """`336 pixels, 576 tokens`, for messages."""
        if self.image.tiling is None:
            return f"{self.image.size} pixels, {self.most_tokens} tokens"
        return f"tiles of {self.image.size} pixels, up to {self.most_tokens:,} tokens"

    def check(self) -> None:
        """Raises ValueError for settings that do not fit the parts."""
        num_blocks(self.vision, self.feature_layer)
        width = self.feature_size
        if self.image.size < self.vision.patch_size:
            raise ValueError(
                f"image_size is {self.image.size}: a patch alone has {self.vision.patch_size} "
                "pixels"
            )
        per_tile = self.tokens_per_tile  # the grid of features may not fold
        if self.image.tiling or self.image.video:
            cells_a_side(self.image, per_tile)
        ProjectorSpec.parse(self.projector).check(width, self.decoder.hidden_size)

    def layouts(self, sources: Sequence[Source], several: bool | None = None) -> list[Layout]:
        """The tiles and tokens of a prompt's pictures and videos; see `images.layouts`."""
        return layouts(self.image, self.tokens_per_tile, sources, several)


def normalize_images(spec: ImageSpec, images: jax.Array) -> jax.Array:
    """uint8 [..., S, S, 3] -> float32, less the encoder's mean, over its deviation."""
    return (images.astype(jnp.float32) / 255 - jnp.array(spec.mean)) / jnp.array(spec.std)


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
        self.vision = ViT(
            c.vision,
            c.feature_layer,
            c.keep_class_token,
            self.dtype,
            self.remat_policy,
            attention="blocks" if self.attention == "blocks" else "xla",
        )
        self.projector = Projector(
            c.projector, c.decoder.hidden_size, c.projector_bias, c.image.newline, self.dtype
        )
        self.decoder = Decoder(
            c.decoder, self.dtype, self.remat_policy, self.attention, self.stacked
        )

    def see(self, tiles: jax.Array) -> jax.Array:
        """Pixels [N, S, S, 3], uint8 or already normalised floats -> what the projector gets."""
        with jax.named_scope("vision"):
            if tiles.dtype == jnp.uint8:
                tiles = normalize_images(self.config.image, tiles)
            features = self.vision(tiles)
            features = features[:, 1:] if self.config.drop_first_patch else features
            if self.config.image.pools_in_encoder:
                features = jnp.concatenate([features, average_squares(features)], axis=1)
            return features

    def encode_images(self, tiles: jax.Array) -> jax.Array:
        """Pixels as of `see` -> features [N, P, D]."""
        seen = self.see(tiles)
        with jax.named_scope("vision"):
            return self.projector(seen)

    def embed(
        self,
        input_ids: jax.Array,
        features: jax.Array | None,
        feature_ids: jax.Array,
        feature_places: jax.Array | None = None,
        feature_weights: jax.Array | None = None,
    ) -> jax.Array:
        """Token embeddings [..., T, D] with image features at the positions that show one.

            input_ids    5 -200 -200 -200 7    feature_ids  -1 0 1 -2 -1    features  a b
            embeddings   e5   a    b    n e7                                newline   n

        A gather within the row, so a sharded batch needs no communication. Where tokens mix several
        features (`ImageSpec.taps`), ids and places have an axis more, and weights are given.

        Args:
          input_ids: int[..., T]; what stands at an image's positions is not looked at.
          features: [..., F, D] from `encode_images`, those of all tiles of a row one after the
            other; None where there are none.
          feature_ids: int[..., T], or [..., T, TAPS], the feature that stands at each position,
            below 0 for text; NEWLINE for the learnt newline.
          feature_places: int[..., F], the position where each feature stands, below 0 for none: a
            gradient is taken by it and no feature may stand twice. With taps [..., F, TAPS], as
            `taps.inverse` gives it. Not needed without gradients.
          feature_weights: float[..., T, TAPS], only with taps.
        """
        embeddings = self.decoder.embed(jnp.maximum(input_ids, 0))  # -200 is in no table
        if features is None:
            return embeddings
        if feature_weights is None:
            gathered = take_rows(features, feature_ids, feature_places)
        else:
            gathered = mix_rows(features, feature_ids, feature_weights, feature_places)
            feature_ids = feature_ids[..., 0]
        is_image = (feature_ids >= 0)[..., None]
        embeddings = jnp.where(is_image, gathered.astype(embeddings.dtype), embeddings)
        if not self.config.image.newline:
            return embeddings
        newline = self.projector.newline_token().astype(embeddings.dtype)
        return jnp.where((feature_ids == NEWLINE)[..., None], newline, embeddings)

    def embed_rows(
        self,
        input_ids: jax.Array,
        tiles: jax.Array | None,
        feature_ids: jax.Array,
        feature_places: jax.Array | None,
        feature_weights: jax.Array | None = None,
        seen: jax.Array | None = None,
    ) -> jax.Array:
        """Embeddings [B, T, D] of rows with their pictures; arguments as in `__call__`."""
        features, shown = None, tiles if seen is None else seen
        if shown is not None and shown.shape[1]:
            encode = self.encode_images if seen is None else self.projector
            features = encode(shown.reshape(-1, *shown.shape[2:]))
            features = features.reshape(len(input_ids), -1, features.shape[-1])  # [B, K * P, D]
        return self.embed(input_ids, features, feature_ids, feature_places, feature_weights)

    def __call__(
        self,
        input_ids: jax.Array,
        tiles: jax.Array | None,
        feature_ids: jax.Array,
        feature_places: jax.Array | None,
        position_ids: jax.Array,
        segment_ids: jax.Array,
        turn_ids: jax.Array | None = None,
        feature_weights: jax.Array | None = None,
        seen: jax.Array | None = None,
    ) -> jax.Array:
        """Final hidden states [B, T, D].

        Args:
          input_ids, feature_ids, feature_places, feature_weights: as in `embed`.
          tiles: [B, K, S, S, 3], or None for text alone.
          position_ids, segment_ids, turn_ids: int[B, T], as in `Decoder`.
          seen: what `see` gives of the tiles, [B, K, ...], if it is there already; the tiles
            themselves are not looked at then.
        """
        embeddings = self.embed_rows(
            input_ids, tiles, feature_ids, feature_places, feature_weights, seen
        )
        return self.decoder(embeddings, position_ids, segment_ids, turn_ids)

    def attend(self, hidden_states: jax.Array) -> jax.Array:
        """[..., D] -> float32 logits [..., V]."""
        return self.decoder.attend(hidden_states)


def init_params(config: LlavaConfig, key: jax.Array) -> dict:
    """Fresh parameters of the whole model, leaves boxed with their logical axis names."""
    ids = jnp.zeros((1, 1), jnp.int32)
    tiles = jnp.zeros((1, 1, config.image.size, config.image.size, 3), jnp.uint8)
    return LlavaModel(config).init(key, ids, tiles, method=_touch_all)["params"]


def fresh_projector(config: LlavaConfig, key: jax.Array) -> dict:
    """The projector of `init_params`, value for value, without a trace of the other parts."""
    seen = jnp.zeros((1, ProjectorSpec.parse(config.projector).fold ** 2, config.feature_size))
    project = lambda model, seen: model.projector(seen)
    return LlavaModel(config).init(key, seen, method=project)["params"]["projector"]


def _touch_all(model: LlavaModel, ids, tiles):
    taps = model.config.image.taps
    mixed = jnp.zeros((*ids.shape, taps), jnp.int32)
    features, weights = (ids, None) if taps == 1 else (mixed, mixed.astype(jnp.float32))
    return model.attend(model(ids, tiles, features, None, ids, ids, feature_weights=weights))


@functools.cache  # a trace of the whole model: a second and more, and many ask
def abstract_params(config: LlavaConfig) -> dict:
    """Shapes and logical axes of `init_params` without computing anything; to be read only."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
