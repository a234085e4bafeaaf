"""Preference tuning: its loss and gradients, how pairs share rows, what the reference costs."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import partial_eval

from llava_jax.data.pipeline import TrainingData
from llava_jax.data.records import open_records
from llava_jax.data.rows import RowFormat
from llava_jax.models.images import ImageSpec
from llava_jax.models.llava import LlavaModel
from llava_jax.text.templates import PAIR
from llava_jax.training import recipe
from llava_jax.training.losses import answer_log_probs
from llava_jax.training.preferences import PreferenceLoss
from llava_jax.training.stage import Stage
from llava_jax.weights.read.llava_folder import open_llava
from tests import tiny_run
from tests.data.conftest import record
from tests.jaxprs import product_flops
from tests.tiny_model import CONFIG, byte_tokenizer, random_image, random_params
from tests.training.test_step import assert_near
from tests.weights.conftest import TEXT, VISION, randomize
from tests.weights.family_models import family_tokenizer

BETA = 0.3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """pairs.json and its pictures."""
    folder = tmp_path_factory.mktemp("pairs")
    pairs = [tiny_run.pair(i) for i in range(9)]
    for i in range(9):
        random_image(i, (12, 9 + i % 5)).save(folder / f"{i}.png")
    (folder / "pairs.json").write_text(json.dumps(pairs))
    return folder


def batches_of(config, path, tokenizer=None, **options) -> list[dict]:
    settings = {"max_length": 320, "tiles": 4, "turns": PAIR} | options
    size = settings.pop("batch_size", 2)
    row_format = RowFormat.of(config, "chatml", **settings)
    data = TrainingData(
        open_records(path, pairs=True),
        tokenizer or byte_tokenizer(),
        row_format,
        batch_size=size,
        epochs=1,
        pad_final_batch=True,
        progress=False,
    )
    return [batch.arrays for batch in data.batch_iterator()]


def split(params: dict, reference: dict) -> tuple[dict, dict]:
    """(what trains, frozen parameters) of a model whose encoder is frozen."""
    frozen = {"vision": params["vision"]}
    names = ("projector", "decoder")
    frozen["reference"] = {name: reference[name] for name in names}
    return {name: params[name] for name in names}, frozen


@functools.partial(jax.jit, static_argnames=("config", "chunk"))
def loss_and_grads(trainable, frozen, batch, config=CONFIG, chunk=16):
    """((sum of the losses of pairs, figures), gradients)."""
    loss = PreferenceLoss(LlavaModel(config), chunk, BETA, one_tower=True)
    alike = jnp.ones(len(batch["labels"]), jnp.float32)
    total = lambda t: loss(t | {"vision": frozen["vision"]}, frozen, batch, alike)
    return jax.value_and_grad(total, has_aux=True)(trainable)


def summed(folder, **options):
    trainable, frozen = split(random_params(CONFIG), random_params(CONFIG, seed=1))
    found = [
        loss_and_grads(trainable, frozen, batch)
        for batch in batches_of(CONFIG, folder / "pairs.json", **options)
    ]
    return len(found), jax.tree.map(lambda *leaves: sum(leaves), *found)


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_log_probs_of_answers_and_their_gradients(chunk):
    rng = np.random.default_rng(0)
    hidden, table = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, 7, 5), (11, 5)))
    targets = jnp.asarray([[3, -100, 4, 10, 0, -100, 2], [-100] * 5 + [7, 1]])
    answers = jnp.asarray([[0, 0, 0, 1, 1, 3, 1], [2] * 7])

    def plain(hidden, table):
        log_p = jax.nn.log_softmax(hidden @ table.T)
        at_target = jnp.take_along_axis(log_p, jnp.maximum(targets, 0)[..., None], -1)[..., 0]
        mine = (answers[..., None] == jnp.arange(4)) & (targets >= 0)[..., None]
        return jnp.sum(jnp.where(mine, at_target[..., None], 0), axis=1)

    ours = lambda *x: answer_log_probs(*x, targets, answers, 4, chunk)
    np.testing.assert_allclose(ours(hidden, table), plain(hidden, table), rtol=1e-5)
    square = lambda f: jax.grad(lambda *x: jnp.sum(f(*x) ** 2), argnums=(0, 1))
    for found, wanted in zip(
        square(ours)(hidden, table), square(plain)(hidden, table), strict=True
    ):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    alone = jax.grad(lambda h: jnp.sum(ours(h, table) ** 2))(hidden)  # of a frozen table
    np.testing.assert_allclose(alone, square(plain)(hidden, table)[0], rtol=1e-4, atol=1e-4)


def torch_llava(seed: int):
    """A random LLaVA of transformers; of all seeds with the same encoder."""
    import torch
    import transformers

    config = transformers.LlavaConfig(
        text_config=TEXT
        | {"model_type": "llama", "vocab_size": 320, "max_position_embeddings": 1024},
        vision_config=VISION | {"model_type": "clip_vision_model"},
        image_token_index=259,
    )
    model = randomize(transformers.LlavaForConditionalGeneration(config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "vision_tower" not in name:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def torch_log_prob(model, batch: dict):
    """log p of the only answer of a row."""
    import torch

    used = int((batch["segment_ids"][0] == 1).sum())
    ids = np.where(batch["input_ids"] < 0, 259, batch["input_ids"])[:, :used]
    labels = torch.from_numpy(batch["labels"][:, 1:used].astype(np.int64))
    spec = ImageSpec()
    pixels = (batch["tiles"][0, :1] / 255 - np.array(spec.mean)) / np.array(spec.std)
    shown = {"pixel_values": torch.from_numpy(pixels.transpose(0, 3, 1, 2)).float()}
    logits = model(
        input_ids=torch.from_numpy(ids.astype(np.int64)), **(shown if (ids == 259).any() else {})
    ).logits
    log_p = torch.log_softmax(logits[:, :-1], -1)
    at_label = log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return (at_label * (labels >= 0)).sum()


def test_loss_and_gradients_are_those_of_the_formula_in_torch(tmp_path):
    """Each answer by itself through transformers, and the formula of the paper."""
    torch = pytest.importorskip("torch")
    policy, reference = torch_llava(1), torch_llava(2)
    opened = {}
    for name, model in (("policy", policy), ("reference", reference)):
        model.save_pretrained(tmp_path / name)
        family_tokenizer().save_pretrained(tmp_path / name)
        opened[name] = open_llava(tmp_path / name)
    config, tokenizer = opened["policy"].config, family_tokenizer()
    pairs = [tiny_run.pair(i) for i in (0, 1, 3)]
    for i in (0, 3):
        random_image(i, (40, 31)).save(tmp_path / f"{i}.png")
    alone = []
    for item in pairs:
        for answer in (item["chosen"], item["rejected"]):
            question = item["prompt"]
            alone.append(record(item["id"], question, answer, item.get("image")))
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    (tmp_path / "alone.json").write_text(json.dumps(alone))
    options = {"max_length": 160, "tiles": 2, "batch_size": 1}

    losses = []
    for number in range(3):
        rows = []
        for place in (0, 1):
            (tmp_path / "one.json").write_text(json.dumps([alone[2 * number + place]]))
            rows += batches_of(
                config, tmp_path / "one.json", tokenizer, turns="conversation", **options
            )
        ours, theirs = [], []
        for row in rows:
            ours.append(torch_log_prob(policy, row))
            with torch.no_grad():
                theirs.append(torch_log_prob(reference, row))
        margin = (ours[0] - theirs[0]) - (ours[1] - theirs[1])
        losses.append(-torch.nn.functional.logsigmoid(BETA * margin))
    total = sum(losses)
    total.backward()
    with torch.no_grad():  # the gradients in the place of the weights, so that they can be read
        for parameter in policy.parameters():
            grad = parameter.grad
            parameter.copy_(torch.zeros_like(parameter) if grad is None else grad)
    policy.save_pretrained(tmp_path / "gradients")
    family_tokenizer().save_pretrained(tmp_path / "gradients")
    wanted = open_llava(tmp_path / "gradients").read("float32")

    params = {name: model.read("float32") for name, model in opened.items()}
    trainable, frozen = split(params["policy"], params["reference"])
    found = [
        loss_and_grads(trainable, frozen, batch, config)
        for batch in batches_of(
            config, tmp_path / "pairs.json", tokenizer, **options | {"max_length": 400}
        )
    ]
    (loss, figures), grads = jax.tree.map(lambda *leaves: sum(leaves), *found)
    assert abs(float(loss) - total.item()) < 1e-5 * total.item()
    assert 0 < figures["reward/accuracy"] < 3 or abs(figures["reward/margin"]) > 0.1
    assert_near(grads, {name: wanted[name] for name in grads}, share=1e-5)


def test_packed_and_unpacked_give_the_same_loss_and_gradients(folder):
    packed, ((loss, figures), grads) = summed(folder)
    plain, ((plain_loss, plain_figures), plain_grads) = summed(folder, packing=False)
    assert packed < plain == 5
    np.testing.assert_allclose(loss, plain_loss, rtol=1e-5)
    assert_near(grads, plain_grads)
    for name, value in figures.items():
        np.testing.assert_allclose(value, plain_figures[name], rtol=1e-4, err_msg=name)


def test_a_model_that_is_its_reference_has_the_loss_of_a_coin(folder):
    batch = batches_of(CONFIG, folder / "pairs.json", batch_size=1)[0]
    params = random_params(CONFIG)
    (loss, figures), grads = loss_and_grads(*split(params, params), batch)
    pairs = batch["segment_ids"].max()
    assert pairs > 1
    np.testing.assert_allclose(loss, pairs * math.log(2), rtol=1e-6)
    assert abs(figures["reward/margin"]) < 1e-5
    assert max(float(abs(g).max()) for g in jax.tree.leaves(grads)) > 1e-3


def test_a_frozen_encoder_looks_at_the_pictures_once(folder):
    batch = batches_of(CONFIG, folder / "pairs.json", batch_size=1)[0]
    params = random_params(CONFIG)
    trainable, frozen = split(params, params)

    def flops(one_tower: bool) -> int:
        loss = PreferenceLoss(LlavaModel(CONFIG), 16, BETA, one_tower)
        total = lambda t: loss(t | {"vision": params["vision"]}, frozen, batch, jnp.ones(1))[0]
        traced = jax.make_jaxpr(jax.grad(total))(trainable)
        alive, _ = partial_eval.dce_jaxpr(traced.jaxpr, [True] * len(traced.jaxpr.outvars))
        return product_flops(traced.replace(jaxpr=alive))

    see = lambda tiles: LlavaModel(CONFIG).apply(
        {"params": params}, tiles.reshape(-1, *tiles.shape[2:]), method=LlavaModel.see
    )
    tower = product_flops(jax.make_jaxpr(see)(batch["tiles"]))
    assert tower > 0 and flops(False) - flops(True) == tower


STAGES = {
    "whole": {"trainable": {"projector": 1e-3, "decoder": 1e-3}},
    "lora": {"trainable": {"lora": 1e-2}, "lora.rank": 2},
    "tower": {"trainable": {"vision": 1e-3, "projector": 1e-3, "decoder": 1e-3}},
}


def stage_of(world, aligned, folder, changes: dict, devices: int = 1) -> Stage:
    values = tiny_run.preferences(world, folder / "run", aligned, folder / "pairs.json", changes)
    return Stage.of(tiny_run.recipe(values), jax.devices()[:devices])


def test_several_devices_do_what_one_does(world, aligned, folder):
    def two_steps(devices: int, mesh: dict):
        changes = {f"mesh.{axis}": size for axis, size in mesh.items()}
        changes |= {"batch_size": 4, "accumulation": 1 if devices > 1 else 2, "data.packing": False}
        stage = stage_of(world, aligned, folder, STAGES["whole"] | changes, devices)
        optimizer = stage.optimizer(lambda step: 1.0)
        state, frozen = stage.starting_state(recipe.starting_sources(stage.config), optimizer)
        data = stage.training_data(byte_tokenizer(), progress=False, cache_dir=None)
        arrays = stage.put(next(data.batch_iterator()).arrays)
        with stage.scope():
            step = stage.compile_step(optimizer, state, frozen, arrays)
            for _ in range(2):
                state, metrics = step(state, frozen, arrays)
        return jax.device_get(metrics)

    alone, shared = two_steps(1, {"fsdp": 1}), two_steps(8, {"data": 2, "fsdp": 2, "tensor": 2})
    assert alone["reward/margin"] > 1e-3 and alone["loss"] < math.log(2)
    for name in alone:
        np.testing.assert_allclose(shared[name], alone[name], rtol=2e-3, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("kind", STAGES)
def test_the_reference_is_no_copy_of_what_does_not_train(kind, world, aligned, folder):
    stage = stage_of(world, aligned, folder, STAGES[kind])
    wanted = {"whole": {"projector", "decoder"}, "lora": set()}
    wanted["tower"] = {"vision", "projector", "decoder"}
    assert set(stage.frozen.get("reference", ())) == wanted[kind]
    assert stage.loss.one_tower == (kind != "tower")
    adapted = stage_of(world, aligned, folder, STAGES["lora"] | {"lora.targets": ("vision/*",)})
    assert not adapted.loss.one_tower
