"""LoRA adapters against PEFT itself: ours loaded by it, its own read by us."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from safetensors.torch import save_file  # noqa: E402

from llava_jax import cli  # noqa: E402
from llava_jax.errors import LlavaError  # noqa: E402
from llava_jax.inference.model import Llava  # noqa: E402
from llava_jax.weights.read.llava_folder import open_llava  # noqa: E402
from tests.tiny_model import byte_tokenizer  # noqa: E402
from tests.weights.test_export import lora_run  # noqa: E402
from tests.weights.test_parity import tiny_llava  # noqa: E402


def logits(model, ids: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        found = model.eval()(input_ids=torch.tensor(ids), pixel_values=torch.tensor(pixels))
    return found.logits.numpy()


def test_ours_in_peft(tmp_path):
    run, base = lora_run(tmp_path)
    adapter = tmp_path / "adapter"
    assert cli.main(["export", str(run), "--format", "peft", "--out", str(adapter)]) == 0
    config = open_llava(base).config
    rng, count = np.random.default_rng(0), config.tokens_per_tile
    ids = rng.integers(0, 256, (1, 9 + count))
    ids[:, 3 : 3 + count] = config.image_token_id
    side = config.image.size
    pixels = rng.standard_normal((1, 3, side, side)).astype(np.float32)
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(base)
    before = logits(theirs, ids, pixels)
    theirs = peft.PeftModel.from_pretrained(theirs, adapter)
    found = logits(theirs, ids, pixels)
    assert np.abs(found - before).max() > 1
    ours = Llava.from_pretrained(run).logits(ids, pixels)
    np.testing.assert_allclose(ours, found, atol=1e-4)


VARIANTS = {
    "plain": {},
    "rank-stabilised": {"use_rslora": True},
    "patterns": {"alpha_pattern": {"q_proj": 3}, "rank_pattern": {"mlp.up_proj": 1}},
    "all linear layers": {"target_modules": "all-linear"},
    "a whole module": {"modules_to_save": ["lm_head"]},
    "DoRA": {"use_dora": True},
    "biases of the update": {"target_modules": ["linear_1", "out_proj"], "lora_bias": True},
    "orthogonal start": {"init_lora_weights": "orthogonal"},
    "the head": {"target_modules": ["lm_head", "q_proj", "linear_1"]},
    "the embedding": {"target_modules": ["embed_tokens", "position_embedding", "q_proj"]},
    "patches": {"target_modules": ["patch_embedding", "q_proj", "linear_1"]},
    "rows": {"target_modules": ["v_proj", "up_proj"], "trainable_token_indices": [9, 4]},
    "rows of both tables": {
        "target_modules": ["v_proj"],
        "trainable_token_indices": {"embed_tokens": [9, 4], "lm_head": [1]},
    },
    "a module's full name": {
        "alpha_pattern": {"vision_tower.encoder.layers.1.self_attn.q_proj": 9},
    },
}


@pytest.mark.parametrize("name", ["q_proj", "all-linear", "o_proj"])
def test_dinov2_under_the_names_that_transformers_5_has_in_memory(name, tmp_path):
    targets = name if name == "all-linear" else [name, "v_proj"]
    check(tmp_path, {"tower": "dinov2"}, target_modules=targets)


TIED = {
    "the head": {"target_modules": ["lm_head"]},
    "the embedding": {"target_modules": ["embed_tokens"]},
    "the whole embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "rows": {"target_modules": ["v_proj"], "trainable_token_indices": [9, 4]},
}


@pytest.mark.parametrize("variant", TIED)
def test_a_language_model_with_tied_weights(variant, tmp_path):
    """PEFT trains one of the two, so that they are one table no more; rows change both."""
    config = check(tmp_path, {"tie": True}, **TIED[variant])
    assert config.decoder.tie_word_embeddings == (variant == "rows")


def check(folder, model: dict, **settings):
    """Our logits of an adapter on its base are PEFT's; our config."""
    theirs = trained(folder, {"vocab_size": 320, "image_token_index": 300} | model, **settings)
    opened = open_llava(folder / "adapter", base=folder / "base")
    config = opened.config
    rng, count, side = np.random.default_rng(0), config.tokens_per_tile, config.image.size
    ids = rng.integers(0, 50, (1, 9 + count))
    ids[:, 3 : 3 + count] = config.image_token_id
    pixels = rng.standard_normal((1, 3, side, side)).astype(np.float32)
    ours = Llava(config, jax.device_put(opened.read()), byte_tokenizer(), "v1")
    found = np.asarray(ours.logits(ids, pixels))
    np.testing.assert_allclose(found, logits(theirs, ids, pixels), atol=1e-4)
    return config


def raw_names(model, path) -> None:
    """The state dict as it is, with the adapter's name in it, as trainers have saved it."""
    parts = ("lora_", "modules_to_save", "original_module", "token_adapter")
    state = {k: v for k, v in model.state_dict().items() if any(part in k for part in parts)}
    save_file({k: v.contiguous().clone() for k, v in state.items()}, path)


RAW = {
    "plain": {},
    "DoRA": {"use_dora": True},
    "a whole module": {"modules_to_save": ["multi_modal_projector"]},
    "the embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "rows": {"target_modules": ["v_proj"], "trainable_token_indices": [9, 4]},
}


@pytest.mark.parametrize("variant", RAW)
def test_names_with_the_adapters_name_in_them(variant, tmp_path):
    model = trained(tmp_path, **RAW[variant])
    options = {"base": tmp_path / "base"}
    expected = open_llava(tmp_path / "adapter", **options).read()
    raw_names(model, tmp_path / "adapter" / "adapter_model.safetensors")
    found = open_llava(tmp_path / "adapter", **options).read()
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def trained(folder, model=None, **settings):
    """A LLaVA in folder/base and an adapter on it in folder/adapter; the model with both.

    `model`: arguments of `tiny_llava`; `tie` ties its embedding and head.
    """
    options = dict(model or {})
    if options.pop("tie", False):
        options["tie_word_embeddings"] = True
    base = tiny_llava(**options)
    base.save_pretrained(folder / "base")
    settings = {"r": 2, "lora_alpha": 5, "target_modules": ["q_proj", "up_proj", "linear_1"]} | (
        settings
    )
    model = peft.get_peft_model(base, peft.LoraConfig(**settings))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model.save_pretrained(folder / "adapter")
    return model


@pytest.mark.parametrize("variant", VARIANTS)
def test_theirs_in_ours(variant, tmp_path):
    model = trained(tmp_path, **VARIANTS[variant])
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    found = open_llava(tmp_path / "adapter", base=tmp_path / "base").read()
    expected, before = (open_llava(tmp_path / name).read() for name in ("merged", "base"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, expected)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), expected, before)
    assert sum(jax.tree.leaves(moved)) >= 3


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'.*merge it with PEFT first"),
        ({"use_dora": True, "target_modules": ["patch_embedding"]}, "DoRA .* linear layers alone"),
    ],
)
def test_what_is_not_read(settings, words, tmp_path):
    trained(tmp_path, **settings)
    with pytest.raises(LlavaError, match=words):
        open_llava(tmp_path / "adapter", base=tmp_path / "base")
