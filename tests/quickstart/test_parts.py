"""The conversion of the packages' weights, on small stand-ins for the real files."""

import numpy as np
import pytest

from llava_jax.errors import LlavaError
from llava_jax.models.presets import DINOV2_SMALL
from llava_jax.quickstart import parts
from llava_jax.quickstart.packages import package_file, package_folder
from llava_jax.weights.checksums import write_checksums


def llama_cpp_permutation(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k rows: halves of a head are interleaved."""
    size = len(weight) // heads
    order = [
        head * size + half * (size // 2) + i
        for head in range(heads)
        for i in range(size // 2)
        for half in range(2)
    ]
    return weight[order]


@pytest.mark.parametrize("heads", [1, 3])
def test_undo_rope_permutation(heads):
    weight = np.random.default_rng(0).standard_normal((heads * 8, 5))
    permuted = llama_cpp_permutation(weight, heads)
    assert (permuted != weight).any()
    np.testing.assert_array_equal(parts.undo_rope_permutation(permuted, heads), weight)


def test_dinov2_weights_of_an_onnx_graph():
    """Linear weights are found by the bias they are added to, whichever operand that is."""
    onnx = pytest.importorskip("onnx")
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    rng = np.random.default_rng(0)
    width, grid = DINOV2_SMALL.hidden_size, DINOV2_SMALL.image_size // DINOV2_SMALL.patch_size
    constants = {
        "backbone.fc1.bias": rng.standard_normal(6, np.float32),
        "backbone.fc2.bias": rng.standard_normal(4, np.float32),
        "backbone.norm.weight": rng.standard_normal(4, np.float32),
        "backbone.embeddings.cls_token": rng.standard_normal((1, 1, width), np.float32),
        "decoder.conv.bias": rng.standard_normal(4, np.float32),
        "onnx::MatMul_1": rng.standard_normal((4, 6), np.float32),
        "onnx::MatMul_2": rng.standard_normal((6, 4), np.float32),
        "onnx::Concat_3": rng.standard_normal((1, 1, width), np.float32),
        "onnx::Reshape_4": rng.standard_normal((1, grid * grid, width), np.float32),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "onnx::MatMul_1"], ["a"]),
        helper.make_node("Add", ["backbone.fc1.bias", "a"], ["b"]),
        helper.make_node("MatMul", ["b", "onnx::MatMul_2"], ["c"]),
        helper.make_node("Add", ["c", "backbone.fc2.bias"], ["d"]),
        helper.make_node("MatMul", ["d", "d"], ["e"]),
    ]
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "graph", [], [], tensors)
    weights = parts.dinov2_weights(graph, numpy_helper.to_array)
    assert set(weights) == {
        "fc1.weight",
        "fc1.bias",
        "fc2.weight",
        "fc2.bias",
        "norm.weight",
        "embeddings.cls_token",
        "embeddings.position_embeddings",
    }
    np.testing.assert_array_equal(weights["fc1.weight"], constants["onnx::MatMul_1"].T)
    np.testing.assert_array_equal(weights["fc2.weight"], constants["onnx::MatMul_2"].T)
    positions = weights["embeddings.position_embeddings"]
    assert positions.shape == (1, grid * grid + 1, width)
    np.testing.assert_array_equal(positions[:, :1], constants["onnx::Concat_3"])


def test_tokenizer_from_gguf_metadata(tmp_path):
    transformers = pytest.importorskip("transformers")
    letters = [chr(c) for c in range(33, 127)] + ["Ġ", "Ċ"]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters, "ab", "12"]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(tokens) - 3),
        "tokenizer.ggml.merges": ["a b", "1 2"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.chat_template": "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}",
        "llama.context_length": 64,
    }
    parts._write_tokenizer(tmp_path, metadata)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    words = tokenizer.convert_ids_to_tokens(tokenizer("ab 12<|im_end|>\nab")["input_ids"])
    assert words == ["ab", "Ġ", "1", "2", "<|im_end|>", "Ċ", "ab"]  # digits never merge
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False)
    assert text == "<|im_start|>ab"


def test_a_whole_folder_is_kept_and_a_changed_one_made_again(tmp_path, monkeypatch):
    made = []

    def make(folder):
        made.append(folder.name)
        (folder / "file").write_text("x")
        return "made"

    monkeypatch.setattr(parts, "make_language_model", make)
    monkeypatch.setattr(parts, "make_vision_encoder", make)
    lines = []
    vision, decoder = parts.prepare_parts(tmp_path, lines.append)
    parts.prepare_parts(tmp_path, lines.append)
    assert len(made) == 2
    (vision / "file").write_text("y")
    parts.prepare_parts(tmp_path, lines.append)
    assert len(made) == 3 and (vision / "file").read_text() == "x"
    assert any("changed" in line and str(vision) in line for line in lines)
    assert decoder.name == parts.DECODER_FOLDER


def test_a_part_that_fails_its_check_leaves_no_folder(tmp_path, monkeypatch):
    def fail(folder):
        (folder / "file").write_text("x")
        raise LlavaError("wrong answer")

    monkeypatch.setattr(parts, "make_language_model", fail)
    with pytest.raises(LlavaError, match="wrong answer"):
        parts.prepare_parts(tmp_path, lambda line: None)
    assert list(tmp_path.iterdir()) == []


def test_missing_packages_are_named(tmp_path):
    with pytest.raises(LlavaError, match="no-such-package.*not installed"):
        package_folder("no_such_package", "no-such-package")
    with pytest.raises(LlavaError, match="nothing.bin is missing"):
        package_file("llava_jax", "llava_jax", "nothing.bin")


def test_checksums_are_not_of_themselves(tmp_path):
    (tmp_path / "file").write_text("x")
    write_checksums(tmp_path)
    first = (tmp_path / "checksums.json").read_text()
    write_checksums(tmp_path)
    assert (tmp_path / "checksums.json").read_text() == first
