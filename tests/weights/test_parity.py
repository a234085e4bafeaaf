"""Loaded weights against transformers: same numbers out, whichever version wrote the names."""

import json

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from llava_jax.models.decoder import Decoder, separate_layers  # noqa: E402
from llava_jax.models.images import features_in_turn  # noqa: E402
from llava_jax.models.llava import LlavaModel, normalize_images  # noqa: E402
from llava_jax.models.vit import ViT  # noqa: E402
from llava_jax.weights.read.llava_folder import load_decoder, load_llava, load_vision  # noqa: E402
from tests.weights.conftest import TEXT, VISION, edit_config, randomize, rename  # noqa: E402

TOLERANCE = 1e-4


def causal(name: str, **fields):
    config = getattr(transformers, f"{name}Config")(**(TEXT | fields))
    return randomize(getattr(transformers, f"{name}ForCausalLM")(config))


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 500.0,
}
DECODERS = {
    "llama": lambda: causal("Llama"),
    "llama, tied, grouped queries": lambda: causal("Llama", tie_word_embeddings=True),
    "llama, all biases": lambda: causal("Llama", attention_bias=True, mlp_bias=True),
    "llama, own head size": lambda: causal("Llama", head_dim=16),
    "llama 3 rope": lambda: causal("Llama", rope_parameters=LLAMA3_ROPE),
    "linear rope": lambda: causal(
        "Llama", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    ),
    "mistral window": lambda: causal("Mistral", sliding_window=5),
    "mistral no window": lambda: causal("Mistral", sliding_window=None),
    "qwen2": lambda: causal("Qwen2", tie_word_embeddings=True),
    "qwen2 window": lambda: causal(
        "Qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=0
    ),
    "qwen3": lambda: causal("Qwen3", head_dim=16),
    "seed_oss": lambda: causal("SeedOss", head_dim=16, attention_out_bias=True),
}


def decoder_logits(config, params, ids: np.ndarray) -> np.ndarray:
    decoder = Decoder(config)
    positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)

    def forward(model):
        hidden = model(model.embed(ids), positions, np.ones_like(ids))
        return model.attend(hidden)

    apply = jax.jit(lambda params: decoder.apply({"params": params}, method=forward))
    return np.asarray(apply(params))


@pytest.mark.parametrize("name", DECODERS)
def test_decoder_logits(name, tmp_path):
    model = DECODERS[name]()
    model.save_pretrained(tmp_path)
    config, params = load_decoder(tmp_path)
    ids = np.random.default_rng(0).integers(0, TEXT["vocab_size"], (2, 40))
    with torch.no_grad():
        expected = model(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(decoder_logits(config, params, ids), expected, atol=TOLERANCE)


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("name", ["llama, tied, grouped queries", "mistral window", "qwen3"])
def test_how_some_tokens_attend(name, stacked, tmp_path):
    """The mean over heads and layers of what transformers gives for all tokens."""
    model = DECODERS[name]()
    model.save_pretrained(tmp_path)
    config, params = load_decoder(tmp_path)
    params = params if stacked else separate_layers(params)
    ids = np.random.default_rng(0).integers(0, TEXT["vocab_size"], (2, 20))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        theirs = model(torch.tensor(ids), output_attentions=True, output_hidden_states=True)
    expected = torch.stack(theirs.attentions).mean((0, 2)).numpy()  # [B, T, T]
    rows = np.array([0, 7, 18, 19])
    read = lambda decoder: decoder.attended(decoder.embed(ids), rows)
    apply = jax.jit(Decoder(config, stacked=stacked).apply, static_argnames="method")
    hidden, shares = apply({"params": params}, method=read)
    np.testing.assert_allclose(shares, expected[:, rows], atol=TOLERANCE)
    np.testing.assert_allclose(hidden, theirs.hidden_states[-1].numpy(), atol=TOLERANCE)


def test_decoder_tensors_are_equal(llama_folder):
    model = transformers.LlamaForCausalLM.from_pretrained(llama_folder)
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    _, params = load_decoder(llama_folder)
    layers = params["layers"]
    for i in range(TEXT["num_hidden_layers"]):
        for ours, theirs in (
            (layers["self_attn"]["k_proj"]["kernel"], "self_attn.k_proj"),
            (layers["self_attn"]["o_proj"]["kernel"], "self_attn.o_proj"),
            (layers["mlp"]["down_proj"]["kernel"], "mlp.down_proj"),
        ):
            np.testing.assert_array_equal(ours[i].T, state[f"model.layers.{i}.{theirs}.weight"])
        np.testing.assert_array_equal(
            layers["post_attention_layernorm"]["scale"][i],
            state[f"model.layers.{i}.post_attention_layernorm.weight"],
        )
    np.testing.assert_array_equal(params["embed_tokens"]["embedding"], state[EMBEDDING])
    np.testing.assert_array_equal(params["lm_head"]["kernel"].T, state["lm_head.weight"])


EMBEDDING = "model.embed_tokens.weight"


def test_sharded_is_single(llama_folder, tmp_path):
    model = transformers.LlamaForCausalLM.from_pretrained(llama_folder)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    _, sharded = load_decoder(tmp_path)
    _, single = load_decoder(llama_folder)
    jax.tree.map(np.testing.assert_array_equal, sharded, single)


def test_bare_model_and_tied_head(llama_folder, tmp_path):
    """LlamaModel has no `model.` level; old tied checkpoints hold a head that nobody reads."""
    _, expected = load_decoder(llama_folder)
    bare = rename(llama_folder, tmp_path / "bare", lambda k: k.removeprefix("model."))
    edit_config(bare, tie_word_embeddings=True)
    config, params = load_decoder(bare)
    assert config.tie_word_embeddings and "lm_head" not in params
    jax.tree.map(np.testing.assert_array_equal, params["layers"], expected["layers"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_stored_dtypes(dtype, llama_folder, tmp_path):
    model = transformers.LlamaForCausalLM.from_pretrained(llama_folder)
    model.to(getattr(torch, dtype)).save_pretrained(tmp_path)
    _, params = load_decoder(tmp_path)
    expected = model.lm_head.weight.detach().float().numpy().T
    assert params["lm_head"]["kernel"].dtype == np.float32
    np.testing.assert_array_equal(params["lm_head"]["kernel"], expected)
    _, kept = load_decoder(tmp_path, dtype=dtype)
    assert kept["norm"]["scale"].dtype.name == dtype


def vision(name: str, **fields):
    config = getattr(transformers, f"{name}Config")(**fields)
    return randomize(getattr(transformers, f"{name}Model")(config))


DINOV2 = {k: v for k, v in VISION.items() if k != "intermediate_size"} | {"mlp_ratio": 2}
ENCODERS = {
    "clip": lambda: vision("CLIPVision", **VISION),
    "clip, gelu": lambda: vision("CLIPVision", **VISION, hidden_act="gelu"),
    "siglip": lambda: vision("SiglipVision", **VISION),
    "dinov2": lambda: vision("Dinov2", **DINOV2),
}


def features_of(config, layer: int, params: dict, pixels: np.ndarray) -> np.ndarray:
    """Our features of pixels [B, 3, H, W], class token included."""
    encoder = ViT(config, layer, keep_class_token=True)
    images = pixels.transpose(0, 2, 3, 1)
    return np.asarray(jax.jit(encoder.apply)({"params": params}, images))


CASES = [(name, -2) for name in ENCODERS] + [
    ("clip", -1),
    ("siglip", -1),
    ("clip", 1),
    ("dinov2", 0),
]


@pytest.mark.parametrize(("name", "layer"), CASES)
def test_vision_features(name, layer, tmp_path):
    model = ENCODERS[name]()
    model.save_pretrained(tmp_path)
    blocks = layer % (VISION["num_hidden_layers"] + 1)
    config, params = load_vision(tmp_path, num_blocks=blocks)
    pixels = np.random.default_rng(0).standard_normal((2, 3, 28, 28), np.float32)
    with torch.no_grad():
        states = model(torch.tensor(pixels), output_hidden_states=True).hidden_states
    features = features_of(config, layer, params, pixels)
    np.testing.assert_allclose(features, states[layer].numpy(), atol=TOLERANCE)
    assert not blocks or len(params["layers"]["layer_norm1"]["scale"]) == blocks


@pytest.mark.parametrize("name", ENCODERS)
def test_vision_names_of_transformers_4_and_5(name, tmp_path):
    model = ENCODERS[name]()
    model.save_pretrained(tmp_path / "old")
    model.save_pretrained(tmp_path / "new", save_original_format=False)
    trees = [load_vision(tmp_path / era)[1] for era in ("old", "new")]
    jax.tree.map(np.testing.assert_array_equal, *trees)


@pytest.mark.parametrize("name", ["clip", "siglip", "dinov2"])
@pytest.mark.parametrize("size", [(49, 21), (60, 44)])
def test_vision_features_at_other_sizes(name, size, tmp_path):
    """Positions are interpolated; what is less than a patch at the right and below is cut off."""
    model = ENCODERS[name]()
    model.save_pretrained(tmp_path)
    config, params = load_vision(tmp_path, num_blocks=VISION["num_hidden_layers"] - 1)
    pixels = np.random.default_rng(0).standard_normal((1, 3, *size), np.float32)
    options = {} if name == "dinov2" else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        outputs = model(torch.tensor(pixels), output_hidden_states=True, **options)
    features = features_of(config, -2, params, pixels)
    np.testing.assert_allclose(features, outputs.hidden_states[-2].numpy(), atol=TOLERANCE)


@pytest.mark.parametrize("name", ["CLIP", "Siglip"])
def test_vision_out_of_a_text_and_image_model(name, tmp_path):
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "vocab_size": 50}
    config = getattr(transformers, f"{name}Config")(vision_config=VISION, text_config=text)
    model = randomize(getattr(transformers, f"{name}Model")(config))
    model.save_pretrained(tmp_path)
    _, params = load_vision(tmp_path)
    expected = model.vision_model.embeddings.position_embedding.weight.detach().numpy()
    np.testing.assert_array_equal(params["position_embed"], expected)


# --- LLaVA ----------------------------------------------------------------------------------------

TEXT_FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 8},
}


def tiny_llava(text="llama", tower="clip_vision_model", vocab_size=80, **fields):
    values = TEXT | {"model_type": text, "vocab_size": vocab_size} | TEXT_FAMILIES[text]
    vision = DINOV2 if tower == "dinov2" else VISION
    config = transformers.LlavaConfig(
        vision_config=vision | {"model_type": tower},
        text_config=values,
        **({"image_token_index": 79} | fields),
    )
    return randomize(transformers.LlavaForConditionalGeneration(config))


def llava_logits(folder, ids: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    config, params = load_llava(folder)
    positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    model = LlavaModel(config)

    def forward(model):
        features = features_in_turn(ids == config.image_token_id)
        hidden = model(ids, pixels, features, None, positions, np.ones_like(ids))
        return model.attend(hidden)

    return np.asarray(jax.jit(lambda p: model.apply({"params": p}, method=forward))(params))


def reference_logits(model, ids: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    flat = pixels.reshape(-1, *pixels.shape[2:]).transpose(0, 3, 1, 2)
    with torch.no_grad():
        return model(input_ids=torch.tensor(ids), pixel_values=torch.tensor(flat)).logits.numpy()


LLAVAS = {
    **{family: {"text": family} for family in TEXT_FAMILIES},
    "siglip": {"tower": "siglip_vision_model", "vision_feature_select_strategy": "full"},
    "interleave": {
        "text": "qwen2",
        "tower": "siglip_vision_model",
        "vision_feature_select_strategy": "full",
        "vision_feature_layer": -1,
    },
    "siglip without its first patch": {"tower": "siglip_vision_model"},
    "dinov2": {"tower": "dinov2"},
    "several layers": {"vision_feature_layer": [-2, 0, 1]},
    "several layers, class token kept": {
        "vision_feature_layer": [1, -1],
        "vision_feature_select_strategy": "full",
    },
    "class token kept": {"vision_feature_select_strategy": "full"},
    "layer from the front": {"vision_feature_layer": 1, "multimodal_projector_bias": False},
}


@pytest.mark.parametrize("name", LLAVAS)
def test_llava_logits(name, tmp_path):
    model = tiny_llava(**LLAVAS[name])
    model.save_pretrained(tmp_path)
    config, _ = load_llava(tmp_path)
    rng = np.random.default_rng(0)
    count = config.tokens_per_tile
    ids = rng.integers(0, 79, (2, 2 * count + 9))  # two pictures a row
    ids[:, 2 : 2 + count] = ids[:, -count - 3 : -3] = config.image_token_id
    images = rng.integers(0, 256, (2, 2, 28, 28, 3), np.uint8)
    pixels = np.asarray(normalize_images(config.image, images))
    expected = reference_logits(model, ids, pixels)
    np.testing.assert_allclose(llava_logits(tmp_path, ids, pixels), expected, atol=TOLERANCE)


def with_tower_level(name: str) -> str:
    return name.replace("vision_tower.", "vision_tower.vision_model.")


@pytest.mark.parametrize(
    ("new_names", "change"),
    [
        (False, with_tower_level),  # transformers 4.36 to 4.57 on disk; the hub's files
        (False, lambda name: name),  # transformers 5 on disk
        (True, with_tower_level),  # transformers 4.52 to 4.57 in memory
        (True, lambda name: name),  # transformers 5 in memory
    ],
)
def test_llava_naming_eras(new_names, change, tmp_path):
    model = tiny_llava()
    model.save_pretrained(tmp_path / "saved", save_original_format=not new_names)
    folder = rename(tmp_path / "saved", tmp_path / "era", change)
    names = json.dumps(sorted(model.state_dict()))
    assert "model.language_model" in names  # this transformers is of the last era
    _, params = load_llava(folder)
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    np.testing.assert_array_equal(
        params["projector"]["linear_1"]["kernel"].T,
        state["model.multi_modal_projector.linear_2.weight"],
    )
    np.testing.assert_array_equal(
        params["vision"]["layers"]["mlp"]["fc1"]["bias"][1],
        state["model.vision_tower.encoder.layers.1.mlp.fc1.bias"],
    )
    np.testing.assert_array_equal(
        params["decoder"]["layers"]["mlp"]["up_proj"]["kernel"][2].T,
        state["model.language_model.layers.2.mlp.up_proj.weight"],
    )
    np.testing.assert_array_equal(params["decoder"]["lm_head"]["kernel"].T, state["lm_head.weight"])


def test_patch_kernel_order(tmp_path):
    """Rows of the patch kernel go by row, column and channel of a patch."""
    model = ENCODERS["clip"]()
    model.save_pretrained(tmp_path)
    _, params = load_vision(tmp_path)
    weight = model.embeddings.patch_embedding.weight.detach().numpy()  # [D, 3, p, p]
    row, column, channel, side = 2, 5, 1, VISION["patch_size"]
    np.testing.assert_array_equal(
        params["patch_embed"]["kernel"][(row * side + column) * 3 + channel],
        weight[:, channel, row, column],
    )
