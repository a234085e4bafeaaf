"""LoRA adapters against PEFT itself: ours loaded by it, its own read by us."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from llava_jax import cli  # noqa: E402
from llava_jax.errors import LlavaError  # noqa: E402
from llava_jax.inference.model import Llava  # noqa: E402
from llava_jax.weights.read.llava_folder import open_llava  # noqa: E402
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
}


def trained(folder, **settings):
    """A LLaVA in folder/base and an adapter on it in folder/adapter; the model with both."""
    tiny_llava().save_pretrained(folder / "base")
    settings = {"r": 2, "lora_alpha": 5, "target_modules": ["q_proj", "up_proj", "linear_1"]} | (
        settings
    )
    model = peft.get_peft_model(tiny_llava(), peft.LoraConfig(**settings))
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


@pytest.mark.parametrize("setting", [{"use_dora": True}, {"bias": "lora_only"}])
def test_what_is_not_read(setting, tmp_path):
    trained(tmp_path, **setting)
    with pytest.raises(LlavaError, match=next(iter(setting))):
        open_llava(tmp_path / "adapter", base=tmp_path / "base")
