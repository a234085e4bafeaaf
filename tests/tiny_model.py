"""A LLaVA of a few thousand random parameters with a byte-level tokenizer, for tests."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llava_jax.data.rows import feature_places
from llava_jax.inference.model import Llava
from llava_jax.models.decoder import DecoderConfig
from llava_jax.models.images import ImageSpec, features_in_turn
from llava_jax.models.llava import LlavaConfig, LlavaModel, abstract_params
from llava_jax.models.vit import ViTConfig
from llava_jax.training.step import AnswerLoss, make_eval_step

VISION = ViTConfig(
    hidden_size=16,
    intermediate_size=32,
    num_layers=3,
    num_heads=2,
    patch_size=4,
    image_size=16,
    hidden_act="gelu",
    layer_norm_eps=1e-6,
    class_token=True,
    pre_norm=False,
    patch_bias=True,
    layer_scale=True,
)
DECODER = DecoderConfig(
    vocab_size=300,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=512,
)
CONFIG = LlavaConfig(vision=VISION, decoder=DECODER, image=ImageSpec(8))  # 4 tokens an image


def config_with(**decoder) -> LlavaConfig:
    return dataclasses.replace(CONFIG, decoder=dataclasses.replace(DECODER, **decoder))


def features_of(ids: np.ndarray, tiles: int, config: LlavaConfig = CONFIG) -> dict:
    """feature_ids [B, T] and feature_places [B, F] of rows that show features in turn."""
    feature_ids = features_in_turn(ids == config.image_token_id)
    places = [feature_places(row, tiles * config.tokens_per_tile) for row in feature_ids]
    return {"feature_ids": feature_ids, "feature_places": np.stack(places)}


def random_params(config: LlavaConfig, seed: int = 0) -> dict:
    """Parameters large enough that each input changes the output; NumPy compiles nothing."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        scale, mean = (0.3, 1.0) if name in ("scale", "layer_scale1") else (0.35, 0.0)
        return jnp.asarray(mean + scale * rng.normal(size=leaf.shape), jnp.float32)

    return jax.tree.map_with_path(draw, nn.meta.unbox(abstract_params(config)))


def loss_and_tokens(model: LlavaModel, params: dict, batch: dict, chunk: int = 16) -> tuple:
    """(sum of token losses, supervised tokens)."""
    sums, tokens = make_eval_step(AnswerLoss(model, chunk))(params, {}, batch)
    return sums["loss"], tokens


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Each UTF-8 byte is a token; the ChatML marks are special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def tiny_llava(config: LlavaConfig = CONFIG, template: str = "chatml", seed: int = 0) -> Llava:
    return Llava(config, random_params(config, seed), byte_tokenizer(), template)


def random_image(seed: int, size: tuple[int, int] = (11, 9)) -> Image.Image:
    """Four blocks of random colours."""
    blocks = np.random.default_rng(seed).integers(0, 256, (2, 2, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST)
