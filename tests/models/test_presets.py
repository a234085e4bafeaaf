"""Every preset has exactly the parameters of the published model, counted without computing."""

import math

import flax.linen as nn
import jax
import pytest

from llava_jax.errors import LlavaError
from llava_jax.models.llava import abstract_params
from llava_jax.models.presets import PRESETS, preset

LLAMA_7B, LLAMA_13B = 6_738_415_616, 13_015_864_320  # as Meta published them
CLIP_BLOCK = 4 * (1024 * 1024 + 1024) + (2 * 1024 * 4096 + 4096 + 1024) + 4 * 1024
# patches, class token, pre-norm, 23 of 24 blocks; positions apart
CLIP_23 = 14 * 14 * 3 * 1024 + 1024 + 2 * 1024 + 23 * CLIP_BLOCK
CLIP_224, CLIP_336 = CLIP_23 + 257 * 1024, CLIP_23 + 577 * 1024
DINO_BLOCK = 4 * (384 * 384 + 384) + (2 * 384 * 1536 + 1536 + 384) + 6 * 384
DINO_8 = (14 * 14 * 3 + 1) * 384 + 384 + (37 * 37 + 1) * 384 + 8 * DINO_BLOCK
SIGLIP_BLOCK = 4 * (1152 * 1152 + 1152) + (2 * 1152 * 4304 + 4304 + 1152) + 4 * 1152
SIGLIP_26 = (14 * 14 * 3 + 1) * 1152 + 27 * 27 * 1152 + 26 * SIGLIP_BLOCK


def mlp(inputs: int, width: int) -> int:
    """Two layers with biases, and the newline."""
    return (inputs + 1) * width + (width + 1) * width + width


COUNTS = {
    "llava-v1-7b": (CLIP_224, 4_198_400, LLAMA_7B),
    "llava-v1-13b": (CLIP_224, 1024 * 5120 + 5120, LLAMA_13B),
    "llava-1.5-7b": (CLIP_336, 20_979_712, LLAMA_7B),
    "llava-1.5-13b": (CLIP_336, 31_467_520, LLAMA_13B),
    # The language models' as their makers count them.
    "llava16_7b": (CLIP_336, mlp(1024, 4096), LLAMA_7B),
    "llava16_13b": (CLIP_336, mlp(1024, 5120), LLAMA_13B),
    "llava16_34b": (CLIP_336, mlp(1024, 7168), 34_388_917_248),
    "llava16_mistral_7b": (CLIP_336, mlp(1024, 4096), 7_241_732_096),
    "llava16_llama3_8b": (CLIP_336, mlp(1024, 4096), 8_030_261_248),
    "onevision_0p5b": (SIGLIP_26, mlp(1152, 896), 494_032_768),
    "onevision_7b": (SIGLIP_26, mlp(1152, 3584), 7_615_616_512),
    "onevision_72b": (SIGLIP_26, mlp(1152, 8192), 72_706_203_648),
    "quickstart": (DINO_8, 384 * 576 + 576 + 576 * 576 + 576, 134_515_008),
}
TILE_TOKENS = {
    "llava-v1": 256,
    "llava-1.5": 576,
    "llava16": 576,
    "onevision": 729,
    "quickstart": 16,
}


def size(tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_counts(name):
    params = nn.meta.unbox(abstract_params(preset(name)))
    counts = tuple(size(params[part]) for part in ("vision", "projector", "decoder"))
    assert counts == COUNTS[name]
    assert set(params) == {"vision", "projector", "decoder"}
    tokens = next(count for start, count in TILE_TOKENS.items() if name.startswith(start))
    assert preset(name).tokens_per_tile == tokens


def test_the_counts_are_those_of_the_published_llava():
    """Hugging Face's llava-1.5-7b-hf: 64 more vocabulary rows, the last block, the final norm."""
    unused = CLIP_BLOCK + 2 * 1024
    assert sum(COUNTS["llava-1.5-7b"]) + unused + 2 * 64 * 4096 == 7_063_427_072


def test_v1_and_15_differ_as_published():
    v1, v15 = preset("llava-v1-7b"), preset("llava-1.5-7b")
    assert (v1.projector, v1.image.mode, v1.image.size) == ("linear", "square", 224)
    assert (v15.projector, v15.image.mode, v15.image.size) == ("mlp2x_gelu", "pad", 336)
    assert v1.feature_layer == v15.feature_layer == -2
    assert (v1.decoder.rms_norm_eps, v15.decoder.rms_norm_eps) == (1e-6, 1e-5)
    assert (v1.decoder.max_position_embeddings, v15.decoder.max_position_embeddings) == (2048, 4096)


def test_pictures_of_16_and_onevision_take_the_published_tokens():
    """By the original code: 300 x 200 pixels in 1 x 2 tiles; a full A4 page shrunk to the cap."""
    tokens = lambda name, *sources: [len(x) for x in preset(name).layouts(sources)]
    assert tokens("llava16_7b", (300, 200)) == [976]
    assert tokens("llava16_34b", (1280, 720)) == [1948]
    assert tokens("onevision_7b", (2480, 3508)) == [7353]
    assert tokens("onevision_7b", (951, 1154), (300, 200)) == [730, 730]
    assert tokens("onevision_0p5b", (640, 360, 32)) == [6273]


def test_an_unknown_preset_lists_those_there_are():
    with pytest.raises(LlavaError, match="unknown preset 'llava-2': choose one of .*quickstart"):
        preset("llava-2")
