"""Random LLaVAs of transformers, as nobody chose them: read, asked, converted and read again."""

import dataclasses
import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from llava_jax import cli  # noqa: E402
from llava_jax.inference.model import Llava  # noqa: E402
from llava_jax.weights.read.llava_folder import open_llava  # noqa: E402
from tests.tiny_model import byte_tokenizer  # noqa: E402
from tests.weights.conftest import randomize, rename  # noqa: E402
from tests.weights.test_parity import with_tower_level  # noqa: E402

IMAGE, ROWS, STEPS = 299, 300, 64
ROPES = (
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 2.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
)


class Draw:
    """Choices that a seed makes."""

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)

    def one(self, *choices):
        return choices[self.rng.integers(len(choices))]

    def yes(self) -> bool:
        return bool(self.rng.integers(2))


def text_config(draw: Draw) -> dict:
    family, heads = draw.one("llama", "mistral", "qwen2", "qwen3"), draw.one(2, 4, 6)
    values = {
        "model_type": family,
        "vocab_size": ROWS,
        "hidden_size": heads * draw.one(6, 8, 16),
        "intermediate_size": draw.one(24, 40),
        "num_hidden_layers": draw.one(1, 2, 3),
        "num_attention_heads": heads,
        "num_key_value_heads": draw.one(*(n for n in (1, 2, 3, 6) if heads % n == 0)),
        "max_position_embeddings": 512,
        "rms_norm_eps": draw.one(1e-6, 1e-5),
        "tie_word_embeddings": draw.yes(),
        "rope_parameters": draw.one(*ROPES) | {"rope_theta": draw.one(1e4, 1e6)},
    }
    if family == "qwen3" or (family != "qwen2" and draw.yes()):
        values["head_dim"] = draw.one(6, 8, 12)
    if family in ("llama", "qwen3"):
        values["attention_bias"] = draw.yes()
    if family == "llama":
        values["mlp_bias"] = draw.yes()
    window = draw.one(None, 7)
    if family == "mistral":
        values["sliding_window"] = window
    elif family != "llama":
        layers = draw.one(0, 99)  # on all layers or on none
        values |= {"use_sliding_window": bool(window), "sliding_window": window or 7}
        values["max_window_layers"] = layers
    return values


def vision_config(draw: Draw) -> dict:
    heads, patch = draw.one(1, 2, 4), draw.one(4, 5, 7)
    return {
        "model_type": draw.one("clip_vision_model", "siglip_vision_model"),
        "hidden_size": heads * draw.one(4, 12),
        "intermediate_size": draw.one(16, 40),
        "num_hidden_layers": draw.one(2, 3, 4),
        "num_attention_heads": heads,
        "image_size": patch * draw.one(2, 3) + draw.one(0, 1),
        "patch_size": patch,
        "hidden_act": draw.one("quick_gelu", "gelu", "gelu_pytorch_tanh"),
    }


def random_llava(draw: Draw):
    vision = vision_config(draw)
    states = range(-vision["num_hidden_layers"] - 1, vision["num_hidden_layers"] + 1)
    layer = draw.one(-1, -2, draw.one(*states), [draw.one(*states), draw.one(*states)])
    layer = layer or 1  # transformers itself fails on 0
    text = text_config(draw)
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        vision_feature_layer=layer,
        vision_feature_select_strategy=draw.one("default", "full"),
        multimodal_projector_bias=draw.yes(),
        tie_word_embeddings=text["tie_word_embeddings"],
    )
    return randomize(transformers.LlavaForConditionalGeneration(config))


def save(model, draw: Draw, folder):
    """As one of the versions of transformers does, in one file or several, with a tokenizer."""
    original_names, tower_level = draw.yes(), draw.yes()
    model.save_pretrained(folder / "saved", save_original_format=original_names)
    change = with_tower_level if tower_level else lambda name: name
    era = rename(folder / "saved", folder / "era", change)
    if draw.yes():  # sharded, by another hand than ours
        model.save_pretrained(
            folder / "shards", save_original_format=original_names, max_shard_size="30KB"
        )
        era = folder / "shards"
    byte_tokenizer().save_pretrained(folder / "tokenizer")
    (era / "tokenizer.json").write_bytes((folder / "tokenizer/tokenizer.json").read_bytes())
    return era


def batch(config, draw: Draw) -> dict[str, np.ndarray]:
    """Three rows of different lengths with 0 to 2 images, padded on one side."""
    count, rng = config.tokens_per_tile, draw.rng
    rows, images = [], 0
    for number in rng.permutation(3):
        pieces = [rng.integers(0, 256, 1 + rng.integers(6))]
        for _ in range(number):
            pieces += [np.full(count, IMAGE), rng.integers(0, 256, rng.integers(4))]
        rows.append(np.concatenate(pieces))
        images += number
    longest, left = max(map(len, rows)), draw.yes()
    ids = np.zeros((3, longest), np.int64)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(longest - len(row), None) if left else slice(len(row))
        ids[i, place], mask[i, place] = row, 1
    side = config.image.size
    pixels = rng.standard_normal((images, 3, side, side)).astype(np.float32)
    return {"input_ids": ids, "pixel_values": pixels, "attention_mask": mask}


def reference(model, inputs: dict[str, np.ndarray]) -> np.ndarray:
    tensors = {name: torch.tensor(array) for name, array in inputs.items()}
    # What rows at the left do not hold has no position.
    positions = (tensors["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(**tensors, position_ids=positions).logits.numpy()


def greedy(model, inputs: dict[str, np.ndarray], row: int) -> tuple:
    """(the prompt of one row and what transformers' greedy search adds, images, prompt's length)"""
    ids = inputs["input_ids"][row][inputs["attention_mask"][row] == 1]
    count = (inputs["input_ids"] == IMAGE).sum(1)
    each = count.sum() // len(inputs["pixel_values"])
    first, images = count[:row].sum() // each, count[row] // each
    pixels = inputs["pixel_values"][first : first + images]
    tensors = {"pixel_values": torch.tensor(pixels)} if images else {}
    ids = torch.tensor(ids)[None]
    tokens = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        **tensors,
        max_new_tokens=STEPS,
        do_sample=False,
        eos_token_id=-1,
        pad_token_id=0,
        suppress_tokens=[IMAGE],
    ).numpy()
    return tokens, pixels if images else None, ids.shape[1]


def same_logits(ours: Llava, model, inputs: dict) -> None:
    held = inputs["attention_mask"] == 1
    found = np.asarray(ours.logits(**inputs))
    np.testing.assert_allclose(found[held], reference(model, inputs)[held], atol=1e-4)


def same_greedy_tokens(ours: Llava, model, inputs: dict) -> None:
    tokens, pixels, prompt = greedy(model, inputs, row=0)
    assert tokens.shape[1] == prompt + STEPS
    scores = np.array(ours.logits(tokens[:, :-1], pixels))[0, prompt - 1 :]
    scores[:, IMAGE] = -np.inf
    np.testing.assert_array_equal(scores.argmax(-1), tokens[0, prompt:])


def same_bytes_again(folder, out) -> None:
    """What convert writes is converted again to identical bytes."""
    for source, target in ((folder, out), (out, out.with_name("again"))):
        assert cli.main(["convert", str(source), "--out", str(target)]) == 0
    for path in out.iterdir():
        assert path.read_bytes() == (out.with_name("again") / path.name).read_bytes()


@pytest.mark.parametrize(
    "seed", [*range(2), *(pytest.param(s, marks=pytest.mark.slow) for s in range(2, 40))]
)
def test_hugging_face(seed, tmp_path):
    draw = Draw(seed)
    model = random_llava(draw)
    folder = save(model, draw, tmp_path)
    ours = Llava.from_pretrained(folder)
    inputs = batch(ours.config, draw)
    same_logits(ours, model, inputs)
    same_greedy_tokens(ours, model, inputs)
    same_bytes_again(folder, tmp_path / "out")
    again = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    np.testing.assert_array_equal(reference(again.eval(), inputs), reference(model, inputs))


ORIGINAL_NAMES = (
    ("model.language_model.", "model."),
    ("model.multi_modal_projector.linear_1.", "model.mm_projector.0."),
    ("model.multi_modal_projector.linear_2.", "model.mm_projector.2."),
    ("model.vision_tower.", "model.vision_tower.vision_tower.vision_model."),
    ("lm_head.", "lm_head."),
)


def save_original(model, draw: Draw, folder):
    """As the original code does: in a pickle, the tower inside or in a folder of its own."""
    state, inside, config = {}, draw.yes(), model.config
    for name, tensor in model.state_dict().items():
        old, new = next(pair for pair in ORIGINAL_NAMES if name.startswith(pair[0]))
        if inside or "vision_tower" not in new:
            state[new + name.removeprefix(old)] = tensor
    folder.mkdir()
    torch.save(state, folder / "pytorch_model.bin")
    full = config.vision_feature_select_strategy == "full"
    family = config.text_config.model_type
    values = config.text_config.to_dict() | {
        "model_type": f"llava_{family}",
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": config.vision_config.hidden_size,
        "mm_vision_tower": "someone/clip-vit-of-theirs",
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_select_feature": "cls_patch" if full else "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
    }
    (folder / "config.json").write_text(json.dumps(values))
    tower = transformers.CLIPVisionModel(config.vision_config)
    tower.load_state_dict(model.model.vision_tower.state_dict())
    tower.save_pretrained(folder / "clip-vit-of-theirs")
    byte_tokenizer().save_pretrained(folder / "tokenizer")
    (folder / "tokenizer/tokenizer.json").rename(folder / "tokenizer.json")
    return folder


def original_draw(seed: int):
    """The first random LLaVA from a seed on that the original code could have trained."""
    for number in range(1000 * seed, 1000 * seed + 1000):
        draw = Draw(number)
        model = random_llava(draw)
        c = model.config
        if (
            c.text_config.model_type in ("llama", "mistral")
            and c.vision_config.model_type == "clip_vision_model"
            and isinstance(c.vision_feature_layer, int)
            and c.multimodal_projector_bias
        ):
            return draw, model


@pytest.mark.parametrize(
    "seed", [1, *(pytest.param(s, marks=pytest.mark.slow) for s in range(2, 20))]
)
def test_original(seed, tmp_path):
    draw, model = original_draw(seed)
    folder = save_original(model, draw, tmp_path / "original")
    config = open_llava(folder, allow_pickle=True).config
    ours = Llava.from_pretrained(folder, allow_pickle=True)
    inputs = batch(dataclasses.replace(config, image_token_id=IMAGE), draw)
    held = inputs["attention_mask"] == 1
    asked = inputs | {
        "input_ids": np.where(inputs["input_ids"] == IMAGE, -200, inputs["input_ids"])
    }
    found, expected = np.asarray(ours.logits(**asked)), reference(model, inputs)
    np.testing.assert_allclose(found[held], expected[held], atol=1e-4)
