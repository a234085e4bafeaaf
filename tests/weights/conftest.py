"""Tiny random reference models made with transformers, saved the way users save theirs."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.tiny_model import byte_tokenizer

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 80,
    "max_position_embeddings": 64,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
}


def randomize(model):
    """Gives every parameter random values: fresh norms and biases are all ones and zeros."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.15 + (parameter.mean() > 0.5))
    return model.eval()


def rename(folder: Path, out: Path, new_name) -> Path:
    """A copy of a single-file checkpoint with its tensors renamed (None drops one)."""
    out.mkdir()
    (out / "config.json").write_text((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    renamed = {new_name(k): np.ascontiguousarray(v) for k, v in tensors.items() if new_name(k)}
    save_file(renamed, out / "model.safetensors", {"format": "pt"})
    return out


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def with_tokenizer(folder, rows: int):
    """Gives the folder a tokenizer of `rows` tokens, `<image>` last."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"<{i}>" for i in range(rows - len(tokenizer) - 1)] + ["<image>"])
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory) -> Path:
    """A tiny LlamaForCausalLM as transformers saves it."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("llama")
    model = randomize(transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT)))
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def llama_copy(llama_folder, tmp_path) -> Path:
    """A copy of it that a test may damage."""
    return rename(llama_folder, tmp_path / "llama", lambda name: name)
