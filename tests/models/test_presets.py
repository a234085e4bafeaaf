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
COUNTS = {
    "llava-v1-7b": (CLIP_224, 4_198_400, LLAMA_7B),
    "llava-v1-13b": (CLIP_224, 1024 * 5120 + 5120, LLAMA_13B),
    "llava-1.5-7b": (CLIP_336, 20_979_712, LLAMA_7B),
    "llava-1.5-13b": (CLIP_336, 31_467_520, LLAMA_13B),
    "quickstart": (DINO_8, 384 * 576 + 576 + 576 * 576 + 576, 134_515_008),
}
IMAGE_TOKENS = {
    "llava-v1-7b": 256,
    "llava-v1-13b": 256,
    "llava-1.5-7b": 576,
    "llava-1.5-13b": 576,
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
    assert preset(name).tokens_per_tile == IMAGE_TOKENS[name]


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


def test_an_unknown_preset_lists_those_there_are():
    with pytest.raises(LlavaError, match="unknown preset 'llava-2': choose one of .*quickstart"):
        preset("llava-2")
