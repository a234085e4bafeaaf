"""LLaVA in its original form: the same numbers as its parts in PyTorch, however it was saved."""

import json

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from llava_jax.errors import LlavaError  # noqa: E402
from llava_jax.models.images import features_in_turn  # noqa: E402
from llava_jax.models.llava import LlavaModel  # noqa: E402
from llava_jax.weights.read.llava_folder import load_llava, open_llava  # noqa: E402
from tests.weights.conftest import TEXT, VISION, edit_config, randomize  # noqa: E402

TOWER = "model.vision_tower.vision_tower.vision_model."
PREFIX = "base_model.model."


class Parts:
    """An encoder, a projector and a language model of transformers and PyTorch."""

    def __init__(self, projector="mlp2x_gelu", text="Llama"):
        vision, size = transformers.CLIPVisionConfig(**VISION), TEXT["hidden_size"]
        self.tower = randomize(transformers.CLIPVisionModel(vision))
        text_config = getattr(transformers, f"{text}Config")(**TEXT)
        self.text = randomize(getattr(transformers, f"{text}ForCausalLM")(text_config))
        linear = lambda: torch.nn.Linear(size, size)
        if projector == "linear":
            self.projector = randomize(linear())
        else:
            depth = int(projector[3]) if projector.startswith("mlp") else 0
            layers = [layer for _ in range(depth) for layer in (torch.nn.GELU(), linear())][1:]
            self.projector = randomize(torch.nn.Sequential(*layers))
        self.config = text_config.to_dict() | {
            "model_type": f"llava_{text.lower()}",
            "architectures": [f"Llava{text}ForCausalLM"],
            "mm_projector_type": projector,
            "mm_hidden_size": size,
            "mm_vision_tower": "openai/clip-vit-tiny",
            "mm_vision_select_layer": -2,
            "mm_vision_select_feature": "patch",
            "mm_use_im_start_end": False,
            "mm_use_im_patch_token": False,
            "image_aspect_ratio": "pad",
        }

    def projector_tensors(self) -> dict:
        state = self.projector.state_dict()
        return {f"model.mm_projector.{name}": tensor for name, tensor in state.items()}

    def tower_tensors(self) -> dict:
        return {TOWER + name: tensor for name, tensor in self.tower.state_dict().items()}

    def tensors(self) -> dict:
        return self.text.state_dict() | self.projector_tensors()

    def write(self, folder, tensors: dict, **config):
        """A folder with `pytorch_model.bin`."""
        folder.mkdir()
        torch.save(tensors, folder / "pytorch_model.bin")
        (folder / "config.json").write_text(json.dumps(self.config | config))
        return folder

    def logits(self, ids: np.ndarray, pixels: np.ndarray, layer=-2, keep=False) -> np.ndarray:
        """The features of one picture in the place of -200, then the language model."""
        with torch.no_grad():
            states = self.tower(torch.tensor(pixels), output_hidden_states=True).hidden_states
            features = self.projector(states[layer] if keep else states[layer][:, 1:])
            embed = self.text.get_input_embeddings()
            rows = []
            for row, image in zip(ids, features, strict=True):
                (at,) = np.flatnonzero(row == -200)
                before, after = torch.tensor(row[:at]), torch.tensor(row[at + 1 :])
                rows.append(torch.cat([embed(before), image, embed(after)]))
            return self.text(inputs_embeds=torch.stack(rows)).logits.numpy()


@pytest.fixture(scope="module")
def parts() -> Parts:
    return Parts()


@pytest.fixture(scope="module")
def tower(parts, tmp_path_factory):
    """The encoder's folder, under the name that config.json has for it."""
    folder = tmp_path_factory.mktemp("towers") / "clip-vit-tiny"
    parts.tower.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def whole(parts, tower, tmp_path_factory):
    """A whole model without its encoder, which stands beside it, and our tree of it."""
    folder = parts.write(tower.parent / "whole", parts.tensors())
    return folder, load_llava(folder, allow_pickle=True)[1]


@pytest.fixture
def base(parts, tmp_path):
    """The language model alone."""
    parts.text.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def same(ours: dict, expected: dict) -> None:
    jax.tree.map(np.testing.assert_array_equal, ours, expected)


def logits(folder, ids: np.ndarray, pixels: np.ndarray, **options) -> np.ndarray:
    """Ours, each -200 grown to its number of placeholders."""
    config, params = load_llava(folder, allow_pickle=True, **options)
    assert config.image_token_id == -200
    count = config.tokens_per_tile
    rows = []
    for row in ids:
        (at,) = np.flatnonzero(row == -200)
        rows.append(np.concatenate([row[:at], np.full(count, -200), row[at + 1 :]]))
    grown = np.stack(rows)
    images = pixels.transpose(0, 2, 3, 1)[:, None]
    model, positions = LlavaModel(config), np.broadcast_to(np.arange(grown.shape[1]), grown.shape)

    def forward(model):
        features = features_in_turn(grown == -200)
        hidden = model(grown, images, features, None, positions, np.ones_like(grown))
        return model.attend(hidden)

    return np.asarray(jax.jit(lambda p: model.apply({"params": p}, method=forward))(params))


KINDS = {
    "mlp2x, encoder inside": ({"projector": "mlp2x_gelu"}, {"inside": True}),
    "linear, encoder beside": ({"projector": "linear"}, {}),
    "mlp3x, class token": ({"projector": "mlp3x_gelu"}, {"mm_vision_select_feature": "cls_patch"}),
    "identity, layer 1": ({"projector": "identity"}, {"mm_vision_select_layer": 1}),
    "mistral": ({"text": "Mistral"}, {}),
}


@pytest.mark.parametrize("name", KINDS)
def test_logits(name, tmp_path):
    kind, config = KINDS[name]
    parts, config = Parts(**kind), dict(config)
    inside = parts.tower_tensors() if config.pop("inside", False) else {}
    folder = parts.write(tmp_path / "model", parts.tensors() | inside, **config)
    parts.tower.save_pretrained(tmp_path / "clip-vit-tiny")
    rng = np.random.default_rng(0)
    ids = rng.integers(0, TEXT["vocab_size"], (2, 12))
    ids[0, 3] = ids[1, 7] = -200
    pixels = rng.standard_normal((2, 3, 28, 28), np.float32)
    expected = parts.logits(
        ids,
        pixels,
        config.get("mm_vision_select_layer", -2),
        config.get("mm_vision_select_feature") == "cls_patch",
    )
    np.testing.assert_allclose(logits(folder, ids, pixels), expected, atol=1e-4)


def test_the_encoder_inside_counts_more_than_the_one_beside(parts, whole, tower, tmp_path):
    changed = {name: tensor + 1 for name, tensor in parts.tower_tensors().items()}
    folder = parts.write(tmp_path / "tuned", parts.tensors() | changed)
    _, params = load_llava(folder, vision_tower=tower, allow_pickle=True)
    bias = lambda tree: tree["vision"]["layers"]["mlp"]["fc1"]["bias"]
    np.testing.assert_array_equal(bias(params), bias(whole[1]) + 1)


def test_config_and_pictures(whole, tower):
    (tower / "preprocessor_config.json").write_text(json.dumps({"size": 28, "crop_size": 28}))
    checkpoint = open_llava(whole[0], allow_pickle=True)
    config = checkpoint.config
    assert (config.image.mode, config.image.size, config.projector) == ("pad", 28, "mlp2x_gelu")
    assert (checkpoint.words().template, checkpoint.tokenizer_dir) == ("v1", None)
    edit_config(whole[0], image_aspect_ratio=None)
    assert open_llava(whole[0], allow_pickle=True).config.image.mode == "square"


def test_sharded_and_half_precision(parts, whole, tower, tmp_path):
    halves = {name: tensor.bfloat16() for name, tensor in parts.tensors().items()}
    names = sorted(halves)
    folder = parts.write(tmp_path / "sharded", {})
    (folder / "pytorch_model.bin").unlink()
    shards = {"pytorch_model-1.bin": names[::2], "pytorch_model-2.bin": names[1::2]}
    for shard, held in shards.items():
        torch.save({name: halves[name] for name in held}, folder / shard)
    index = {name: shard for shard, held in shards.items() for name in held}
    text = json.dumps({"weight_map": index})
    (folder / "pytorch_model.bin.index.json").write_text(text)
    _, params = load_llava(folder, "bfloat16", vision_tower=tower, allow_pickle=True)
    rounded = jax.tree.map(lambda leaf: leaf.astype(jax.numpy.bfloat16), whole[1]["decoder"])
    same(params["decoder"], rounded)
    (folder / "pytorch_model-2.bin").unlink()
    refused(folder, "pytorch_model-2.bin", "missing", vision_tower=tower)


# --- on top of a base model -----------------------------------------------------------------------


def test_projector_alone(parts, whole, base, tower, tmp_path):
    folder = tmp_path / "stage1"
    folder.mkdir()
    torch.save(parts.projector_tensors(), folder / "mm_projector.bin")
    (folder / "config.json").write_text(json.dumps(parts.config))
    refused(folder, "holds a projector", "--base", vision_tower=tower)
    _, params = load_llava(folder, base=base, vision_tower=tower, allow_pickle=True)
    same(params, whole[1])


LORA_TARGETS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")


def write_adapter(folder, parts, prefix=PREFIX, rank=2, **settings) -> dict:
    """A LoRA adapter as PEFT lays it out; returns what each weight must grow by."""
    folder.mkdir()
    adapter, growth, state = {}, {}, parts.text.state_dict()
    generator = torch.Generator().manual_seed(1)
    for layer in range(TEXT["num_hidden_layers"]):
        for target in LORA_TARGETS:
            name = f"model.layers.{layer}.{target}"
            out, size = state[f"{name}.weight"].shape
            down = torch.randn(rank, size, generator=generator)
            up = torch.randn(out, rank, generator=generator)
            adapter[f"{prefix}{name}.lora_A.weight"] = down
            adapter[f"{prefix}{name}.lora_B.weight"] = up
            growth[f"{name}.weight"] = up @ down
    torch.save(adapter, folder / "adapter_model.bin")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 6, "fan_in_fan_out": False} | settings
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return growth


@pytest.mark.parametrize(
    ("settings", "scale"),
    [({}, 3.0), ({"use_rslora": True}, 6 / 2**0.5), ({"alpha_pattern": {"q_proj": 2}}, None)],
)
def test_lora(settings, scale, parts, base, tower, tmp_path):
    folder = tmp_path / "lora"
    growth = write_adapter(folder, parts, **settings)
    trained = {f"{PREFIX}{n}": t * 2 for n, t in parts.projector_tensors().items()}
    torch.save(trained, folder / "non_lora_trainables.bin")
    (folder / "config.json").write_text(json.dumps(parts.config))
    refused(folder, "LoRA adapter", "--base", vision_tower=tower)
    _, params = load_llava(folder, base=base, vision_tower=tower, allow_pickle=True)
    state = parts.text.state_dict()
    layers = params["decoder"]["layers"]
    for ours, name in (
        (layers["self_attn"]["q_proj"], "model.layers.2.self_attn.q_proj.weight"),
        (layers["mlp"]["down_proj"], "model.layers.2.mlp.down_proj.weight"),
    ):
        factor = scale or (1.0 if "q_proj" in name else 3.0)
        expected = state[name] + factor * growth[name]
        np.testing.assert_allclose(ours["kernel"][2].T, expected.numpy(), rtol=1e-5, atol=1e-5)
    untouched = state["model.layers.1.mlp.up_proj.weight"].numpy()
    np.testing.assert_array_equal(layers["mlp"]["up_proj"]["kernel"][1].T, untouched)
    weight = parts.projector.state_dict()["0.weight"].numpy()
    np.testing.assert_array_equal(params["projector"]["linear_0"]["kernel"].T, weight * 2)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"lora_alpha": None}, "lora_alpha"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"alpha_pattern": [1]}, "alpha_pattern"),
        ({"alpha_pattern": {"(": 1}}, "alpha_pattern"),
    ],
)
def test_lora_that_is_no_plain_sum(settings, word, parts, base, tower, tmp_path):
    folder = tmp_path / "lora"
    write_adapter(folder, parts, **settings)
    torch.save(parts.projector_tensors(), folder / "non_lora_trainables.bin")
    (folder / "config.json").write_text(json.dumps(parts.config))
    refused(folder, "adapter_config.json", word, base=base, vision_tower=tower)


def test_lora_of_another_base(parts, base, tower, tmp_path):
    folder = tmp_path / "lora"
    write_adapter(folder, parts, prefix=f"{PREFIX}other.")
    torch.save(parts.projector_tensors(), folder / "non_lora_trainables.bin")
    (folder / "config.json").write_text(json.dumps(parts.config))
    refused(folder, "the base has no", "q_proj.weight", base=base, vision_tower=tower)


def test_v0_delta(parts, whole, base, tower, tmp_path):
    """target = base + delta; tokens added to the vocabulary have rows of their own."""
    noise = {name: torch.randn_like(t) for name, t in parts.text.state_dict().items()}
    extra = torch.randn(2, TEXT["hidden_size"])
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        noise[name] = torch.cat([noise[name], extra])
    config = {"model_type": "llama", "mm_use_im_start_end": True, "vocab_size": 82}
    delta = noise | parts.projector_tensors()
    folder = parts.write(tmp_path / "LLaVA-7b-delta-v0", delta, **config)
    refused(folder, "--delta_base", vision_tower=tower)
    refused(folder, "a whole model", "delta_base", vision_tower=tower, base=base)
    options = {"delta_base": base, "vision_tower": tower, "allow_pickle": True}
    checkpoint = open_llava(folder, **options)
    assert checkpoint.words().template == "v0" and checkpoint.config.use_im_start_end
    assert checkpoint.added_tokens == ("<im_start>", "<im_end>")
    decoder = checkpoint.read()["decoder"]
    head = decoder["lm_head"]["kernel"].T
    np.testing.assert_array_equal(head[80:], extra.numpy())
    for ours, name in (
        (head[:80], "lm_head.weight"),
        (decoder["layers"]["mlp"]["up_proj"]["kernel"][1].T, "model.layers.1.mlp.up_proj.weight"),
    ):
        expected = parts.text.state_dict()[name] + noise[name][: len(ours)]
        np.testing.assert_array_equal(ours, expected.numpy())
    delta.pop("model.norm.weight")
    torch.save(delta, folder / "pytorch_model.bin")
    refused(folder, "model.norm.weight", "missing", **options)


@pytest.mark.parametrize("rows", [2, 82])
def test_start_and_end_tokens_of_stage_1(rows, parts, base, tower, tmp_path):
    """Their embeddings lie beside the projector: alone or in the whole table."""
    folder = tmp_path / "stage1"
    folder.mkdir()
    table = torch.randn(82, TEXT["hidden_size"])
    own = parts.projector_tensors() | {"model.embed_tokens.weight": table[-rows:]}
    torch.save(own, folder / "mm_projector.bin")
    config = parts.config | {"mm_use_im_start_end": True, "vocab_size": 82}
    (folder / "config.json").write_text(json.dumps(config))
    options = {"base": base, "vision_tower": tower, "allow_pickle": True}
    checkpoint = open_llava(folder, **options)
    decoder = checkpoint.read()["decoder"]
    embedding, head = decoder["embed_tokens"]["embedding"], decoder["lm_head"]["kernel"].T
    np.testing.assert_array_equal(embedding[-rows:], table[-rows:].numpy())
    old = parts.text.state_dict()["lm_head.weight"].numpy()
    np.testing.assert_array_equal(head[:80], old)
    np.testing.assert_allclose(head[80:], [old.mean(axis=0)] * 2, atol=1e-6)
    assert checkpoint.config.decoder.vocab_size == 82
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": "82"}))
    refused(folder, "config.json", "vocab_size='82'", **options)
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(own | {"model.embed_tokens.weight": table[0]}, folder / "mm_projector.bin")
    refused(folder, "mm_projector.bin", "model.embed_tokens.weight", "row a token", **options)


# --- what an adapter lacks ------------------------------------------------------------------------


def test_an_adapter_without_what_belongs_to_it(parts, base, tower, tmp_path):
    """Each message names the missing file or folder, and the command to type."""
    folder = tmp_path / "lora"
    write_adapter(folder, parts)
    (folder / "config.json").write_text(json.dumps(parts.config))
    command = f"`llava-jax convert --checkpoint {folder} --base MODEL --out DIR`"
    refused(folder, "holds a LoRA adapter", command, vision_tower=tower)
    refused(folder, "no projector", "non_lora_trainables.bin", base=base, vision_tower=tower)
    torch.save(parts.projector_tensors(), folder / "non_lora_trainables.bin")
    command = f"`llava-jax convert --checkpoint {folder} --vision_tower ENCODER --out DIR`"
    refused(folder, "openai/clip-vit-tiny", "weights are not", command, base=base)
    (folder / "config.json").unlink()
    refused(folder, "--checkpoint", "--base LLAVA")


def test_an_adapter_without_a_config_on_a_whole_llava(parts, whole, tmp_path):
    """The base says what it is of, and brings projector and tower."""
    folder, state = tmp_path / "lora", parts.text.state_dict()
    growth = write_adapter(folder, parts)
    opened = open_llava(folder, base=whole[0], allow_pickle=True)
    params = opened.read()
    same(params["projector"], whole[1]["projector"])
    name = "model.layers.1.self_attn.q_proj.weight"
    kernel = params["decoder"]["layers"]["self_attn"]["q_proj"]["kernel"][1]
    expected = state[name] + 3.0 * growth[name]
    np.testing.assert_allclose(kernel.T, expected.numpy(), rtol=1e-5, atol=1e-5)


def test_a_projector_without_its_config(parts, base, tmp_path):
    folder = tmp_path / "stage1"
    folder.mkdir()
    torch.save(parts.projector_tensors(), folder / "mm_projector.bin")
    refused(folder, "mm_projector.bin", "without the config.json", base=base)


def test_a_null_width_of_features_is_none(parts, whole, tmp_path):
    folder = whole[0].parent / tmp_path.name
    parts.write(folder, parts.tensors(), mm_hidden_size=None)
    same(open_llava(folder, allow_pickle=True).read(), whole[1])


# --- what is not supported ------------------------------------------------------------------------


def refused(folder, *words: str, **options) -> None:
    with pytest.raises(LlavaError) as error:
        open_llava(folder, **({"allow_pickle": True} | options))
    for word in words:
        assert word in str(error.value), error.value
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image_aspect_ratio": "highres"}, ("image_aspect_ratio='highres'", "anyres_max_N")),
        ({"image_aspect_ratio": "anyres"}, ("image_grid_pinpoints=None",)),
        ({"mm_patch_merge_type": "spatial_unpad"}, ("spatial_unpad", "must be flat")),
        ({"architectures": ["LlavaMptForCausalLM"]}, ("LlavaMptForCausalLM",)),
        ({"architectures": None, "model_type": "llava_mpt"}, ("llava_mpt",)),
        ({"mm_projector_type": "mlp2x_res2x_gelu"}, ("mlp2x_res2x_gelu",)),
        ({"mm_vision_select_feature": "cls"}, ("mm_vision_select_feature",)),
        ({"mm_vision_select_layer": 7}, ("7", "does not exist")),
        ({"mm_hidden_size": 64}, ("mm_hidden_size=64", "32")),
        ({"s2": True}, ("s2",)),
        ({"mm_vision_tower": "openai/elsewhere"}, ("openai/elsewhere", "--vision_tower")),
    ],
)
def test_configs_that_are_not_supported(change, words, parts, whole, tmp_path):
    folder = parts.write(whole[0].parent / tmp_path.name, parts.tensors(), **change)
    refused(folder, "config.json", *words)


def test_missing_and_extra_tensors_have_their_own_names(parts, tower, tmp_path):
    tensors = parts.tensors()
    bias = tensors.pop("model.mm_projector.2.bias")
    folder = parts.write(tmp_path / "broken", tensors | {"model.mm_projector.4.bias": bias})
    refused(
        folder, "missing model.mm_projector.2.bias", "model.mm_projector.4.bias", vision_tower=tower
    )
