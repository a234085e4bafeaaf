"""The training step: accumulation, packing, and what a frozen tree costs."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from jax.interpreters import partial_eval

from llava_jax.data.pipeline import TrainingData
from llava_jax.data.records import open_records
from llava_jax.data.rows import RowFormat
from llava_jax.models.llava import LlavaModel
from llava_jax.training import step as step_module
from llava_jax.training.optimizer import adamw, split_params
from llava_jax.training.step import (
    AnswerLoss,
    TrainState,
    count_work,
    make_eval_step,
    make_train_step,
    with_kernels_as,
)
from tests import tiny_run
from tests.jaxprs import product_flops
from tests.tiny_model import (
    CONFIG,
    byte_tokenizer,
    features_of,
    loss_and_tokens,
    random_params,
)

MODEL = LlavaModel(CONFIG)
OPTIONS = {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.0, "clip_norm": 1.0}
STAGES = {
    "align": {"projector": 1e-3},
    "instruct": {"projector": 1e-3, "decoder": 1e-3},
    "layers": {"decoder/layers": 1e-3},
}


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    tiny_run.write_data(folder, count=8)
    return folder


def batches(folder=None, records=None, **options) -> list[dict]:
    """One epoch of `records`, or of eight conversations of various answers and images."""
    settings = {"max_length": 320, "tiles": 4, "batch_size": 2, "epochs": 1} | options
    names = {"max_length", "tiles", "packing", "turns"} & settings.keys()
    row_format = RowFormat.of(CONFIG, "chatml", **{name: settings.pop(name) for name in names})
    data = TrainingData(
        records or open_records(folder / "instruct.json", folder / "images"),
        byte_tokenizer(),
        row_format,
        pad_final_batch=True,
        progress=False,
        **settings,
    )
    return [batch.arrays for batch in data.batch_iterator()]


@functools.partial(jax.jit, static_argnames="chunk")
def loss_and_grads(params, batch, chunk=16):
    """((sum of token losses, supervised tokens), gradients of the sum)."""
    total = lambda p: loss_and_tokens(MODEL, p, batch, chunk)
    return jax.value_and_grad(total, has_aux=True)(params)


def summed(folder=None, **options):
    """Loss, supervised tokens and gradients over the whole set."""
    params, total = random_params(CONFIG), None
    for batch in batches(folder, **options):
        result = loss_and_grads(params, batch)
        total = result if total is None else jax.tree.map(jnp.add, total, result)
    return total


def test_packed_and_unpacked_give_the_same_loss_and_gradients(data_folder):
    rows = [len(batches(data_folder, packing=packing)) for packing in (True, False)]
    assert rows[0] < rows[1] == 4
    (loss, tokens), grads = summed(data_folder, packing=True)
    (plain_loss, plain_tokens), plain_grads = summed(data_folder, packing=False)
    assert tokens == plain_tokens > 50
    np.testing.assert_allclose(loss, plain_loss, rtol=1e-5)
    assert_near(grads, plain_grads)


def test_independent_turns_in_a_row_give_what_each_gives_alone(data_folder, tmp_path):
    together, singles = [], []
    for name, source in zip(("a.png", "b.png"), ("0.png", "1.png"), strict=True):
        shutil.copy(data_folder / "images" / source, tmp_path / name)
        exchanges = [("What?", "red"), ("What else?", "it is blue"), ("Sure?", "yes")]
        together.append(conversation(name, exchanges))
        singles += [conversation(name, [exchange]) for exchange in exchanges]
    (tmp_path / "together.json").write_text(json.dumps(together))
    (tmp_path / "singles.json").write_text(json.dumps(singles))

    def measured(name, turns):
        records = open_records(tmp_path / name, tmp_path)
        return summed(records=records, turns=turns, batch_size=1)

    (loss, tokens), grads = measured("together.json", "independent")
    (plain_loss, plain_tokens), plain_grads = measured("singles.json", "conversation")
    assert tokens == plain_tokens > 20
    np.testing.assert_allclose(loss, plain_loss, rtol=1e-5)
    assert_near(grads, plain_grads)
    (other_loss, _), _ = measured("together.json", "conversation")
    assert abs(other_loss - loss) > 1e-3  # answers before a question do change it


def conversation(image: str, exchanges: list[tuple[str, str]]) -> dict:
    turns = []
    for i, (question, answer) in enumerate(exchanges):
        turns.append({"from": "human", "value": question if i else f"<image>\n{question}"})
        turns.append({"from": "gpt", "value": answer})
    return {"id": f"{image} {len(exchanges)}", "image": image, "conversations": turns}


def assert_near(a, b, share: float = 1e-4) -> None:
    """Leaves equal to a share of their largest value: sums in another order differ by that little.

    Gradients that are zero but for rounding (of key biases) are measured by the largest of all.
    """
    largest = max(float(abs(leaf).max()) for leaf in jax.tree.leaves(b))
    for found, wanted in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        tolerance = share * float(abs(wanted).max()) + 0.01 * share * largest
        np.testing.assert_allclose(found, wanted, rtol=10 * share, atol=tolerance)


def test_padding_and_its_pictures_change_nothing(data_folder):
    params, batch = random_params(CONFIG), batches(data_folder)[0]
    before = loss_and_grads(params, batch)
    padding = batch["segment_ids"] == 0
    assert padding.any()
    noise = np.random.default_rng(0).integers(0, 290, padding.shape).astype(np.int32)
    changed = batch | {"input_ids": np.where(padding, noise, batch["input_ids"])}
    jax.tree.map(
        functools.partial(assert_near, share=1e-6), loss_and_grads(params, changed), before
    )


def uneven_batch() -> dict:
    """Four rows with 0, 1, 5 and 11 supervised tokens; the first has no image."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 290, (4, 16)).astype(np.int32)
    ids[1:, 2:6] = CONFIG.image_token_id
    labels = np.full_like(ids, -100)
    for row, count in enumerate((0, 1, 5, 11)):
        labels[row, 16 - count :] = rng.integers(0, 290, count)
    return {
        "input_ids": ids,
        "labels": labels,
        "position_ids": np.tile(np.arange(16, dtype=np.int32), (4, 1)),
        "segment_ids": np.ones_like(ids),
        "tiles": rng.integers(0, 256, (4, 1, 8, 8, 3)).astype(np.uint8),
        **features_of(ids, 1),
    }


@functools.cache
def compiled_step(stage: str, accumulation: int):
    """One step of plain SGD on `uneven_batch`, whose updates show gradients as they are."""
    step = jax.jit(make_train_step(AnswerLoss(MODEL, 16), optax.sgd(0.1), accumulation))
    return step.lower(*start(stage), uneven_batch()).compile()


def start(stage: str) -> tuple[TrainState, dict]:
    trainable, frozen = split_params(random_params(CONFIG), STAGES[stage])
    return TrainState(jnp.int32(0), trainable, optax.sgd(0.1).init(trainable)), frozen


def one_step(stage: str, accumulation: int, batch: dict):
    """(state, metrics) after a step."""
    return compiled_step(stage, accumulation)(*start(stage), batch)


def test_accumulation_changes_nothing():
    """Also where microbatches have different numbers of supervised tokens, or none at all."""
    whole, metrics = one_step("instruct", 1, uneven_batch())
    assert metrics["supervised_tokens"] == 17 and metrics["images"] == 3
    for accumulation in (2, 4):
        state, others = one_step("instruct", accumulation, uneven_batch())
        assert_near(state.params, whole.params, share=1e-5)
        for name in metrics:
            np.testing.assert_allclose(others[name], metrics[name], rtol=1e-5, err_msg=name)


def bfloat16_gradients(accumulation: int) -> dict:
    """Gradients of one step of a model that computes in bfloat16, read off a step of SGD."""
    state, frozen = start("instruct")
    step = make_train_step(
        AnswerLoss(LlavaModel(CONFIG, jnp.bfloat16), 16), optax.sgd(1.0), accumulation
    )
    after, _ = jax.jit(step)(state, frozen, uneven_batch())
    assert {leaf.dtype for leaf in jax.tree.leaves(after.params)} == {jnp.dtype("float32")}
    return jax.tree.map(lambda a, b: np.asarray(b - a), after.params, state.params)


def test_rounded_kernels_cost_the_gradients_of_a_bfloat16_model_their_last_bits(monkeypatch):
    """Kernels' gradients are rounded; microbatches are added in float32."""
    found = {accumulation: bfloat16_gradients(accumulation) for accumulation in (1, 4)}
    monkeypatch.setattr(step_module, "with_kernels_as", lambda params, dtype: params)
    exact = bfloat16_gradients(1)
    for grads in found.values():
        for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(exact), strict=True):
            assert np.linalg.norm(a - b) < 0.01 * np.linalg.norm(b) + 1e-6


def test_kernels_alone_are_rounded_for_the_products():
    params = random_params(CONFIG)
    flat = flatten_dict(with_kernels_as(params, jnp.bfloat16))
    for path, leaf in flat.items():
        assert leaf.dtype == (jnp.bfloat16 if path[-1] == "kernel" else jnp.float32), path
    same = with_kernels_as(params, jnp.float32)
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, same, params))


def test_the_loss_is_the_mean_over_supervised_tokens():
    _, metrics = one_step("instruct", 2, uneven_batch())
    (total, tokens), _ = loss_and_grads(random_params(CONFIG), uneven_batch())
    np.testing.assert_allclose(metrics["loss"], total / tokens, rtol=1e-6)


def test_parity_is_the_mean_over_eighths_of_the_mean_over_their_tokens():
    batch = jax.tree.map(lambda x: np.concatenate([x] * 4), uneven_batch())
    batch["labels"][5] = batch["labels"][7]  # parts of 1, 16, 17 and 22 tokens among others
    step = make_train_step(AnswerLoss(MODEL, 16), optax.sgd(0.1), 2, parity=True)
    state, metrics = jax.jit(step)(*start("instruct"), batch)
    params = random_params(CONFIG)

    def mean(part: int):
        rows = jax.tree.map(lambda x: x[2 * part : 2 * part + 2], batch)
        (total, tokens), grads = loss_and_grads(params, rows)
        return jax.tree.map(lambda x: x / max(tokens, 1), (total, grads))

    means = [mean(part) for part in range(8)]
    loss, grads = jax.tree.map(lambda *x: sum(x) / 8, *means)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    wanted = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
    assert_near(state.params, split_params(wanted, STAGES["instruct"])[0], share=1e-5)


def test_a_batch_with_nothing_supervised_changes_nothing():
    batch = uneven_batch() | {"labels": np.full((4, 16), -100, np.int32)}
    state, metrics = one_step("instruct", 2, batch)
    trainable = split_params(random_params(CONFIG), STAGES["instruct"])[0]
    assert metrics["loss"] == 0 and metrics["grad_norm"] == 0
    jax.tree.map(np.testing.assert_array_equal, state.params, trainable)


def test_accumulated_gradients_are_float32_under_bfloat16_compute():
    model = LlavaModel(CONFIG, jnp.bfloat16)
    trainable, frozen = split_params(random_params(CONFIG), STAGES["instruct"])
    frozen = jax.tree.map(lambda x: x.astype(jnp.bfloat16), frozen)
    seen = []

    class Spy:
        @staticmethod
        def update(grads, state, params):
            seen.extend(leaf.dtype for leaf in jax.tree.leaves(grads))
            return grads, state

    step = make_train_step(AnswerLoss(model, 4), Spy, 2)
    state = TrainState(jnp.int32(0), trainable, ())
    after, metrics = jax.eval_shape(step, state, frozen, uneven_batch())
    assert set(seen) == {jnp.dtype(jnp.float32)} and metrics["loss"].dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(after.params)} == {jnp.dtype(jnp.float32)}


def test_what_a_batch_holds():
    batch = uneven_batch()
    batch["segment_ids"][0, 10:] = 0
    work = count_work(CONFIG, batch)
    assert work["tokens"] == 58 and work["images"] == 3
    assert work["attention_pairs"] == 3 * 16 * 17 // 2 + 10 * 11 // 2


def weight_products() -> dict[str, int]:
    """FLOPs of one forward pass of `uneven_batch` through the weights of each part, by hand."""
    tokens, images, v, d = 4 * 16, 4, CONFIG.vision, CONFIG.decoder
    blocks = 4 * v.hidden_size**2 + 2 * v.hidden_size * v.intermediate_size
    attention = d.hidden_size * d.head_dim * (2 * d.num_heads + 2 * d.num_kv_heads)
    mlp = 3 * d.hidden_size * d.intermediate_size
    return {
        "patches": 2 * images * 4 * (3 * v.patch_size**2) * v.hidden_size,
        "blocks": 2 * images * 5 * 2 * blocks,  # 4 patches and the class token, 2 of 3 blocks
        # the grid of 4 x 4 positions resized to 2 x 2, one axis after the other
        "positions": 2 * (2 * 4 * 4 + 2 * 2 * 4) * v.hidden_size,
        "projector_in": 2 * images * 4 * v.hidden_size * d.hidden_size,
        "projector_out": 2 * images * 4 * d.hidden_size**2,
        "decoder": 2 * tokens * d.num_layers * (attention + mlp),
        "head": 2 * tokens * d.hidden_size * d.vocab_size,
    }


# How often each product runs: forward, once for activations, once for weights.
ENCODER = {"patches": 1, "blocks": 1, "positions": 1}
PASSES = {
    "align": ENCODER | {"projector_in": 2, "projector_out": 3, "decoder": 2, "head": 2},
    "instruct": ENCODER | {"projector_in": 2, "projector_out": 3, "decoder": 3, "head": 3},
    "layers": ENCODER | {"projector_in": 1, "projector_out": 1, "decoder": 3, "head": 2},
}


@pytest.mark.parametrize("stage", STAGES)
def test_no_gradient_of_a_frozen_parameter_is_computed(stage):
    """Counts the products left after dead code is gone, which XLA removes as well."""
    trainable, frozen = split_params(random_params(CONFIG), STAGES[stage])

    def grads(trainable, frozen, batch):
        total = lambda t: make_eval_step(AnswerLoss(MODEL, 16))(t, frozen, batch)[0]["loss"]
        return jax.grad(total)(trainable)

    traced = jax.make_jaxpr(grads)(trainable, frozen, uneven_batch())
    alive, _ = partial_eval.dce_jaxpr(traced.jaxpr, [True] * len(traced.jaxpr.outvars))
    found = product_flops(traced.replace(jaxpr=alive))
    forward = weight_products()
    assert found == sum(PASSES[stage][name] * flops for name, flops in forward.items())


def test_a_compiled_stage_1_step_does_less_than_stage_2():
    """The same of the machine code: two passes of the decoder and not three."""
    flops = {
        stage: compiled_step(stage, 1).cost_analysis()["flops"] for stage in ("align", "instruct")
    }
    forward = weight_products()
    # XLA counts the body of the scan over two layers once.
    saved = forward["decoder"] / 2 + forward["head"]
    assert flops["instruct"] - flops["align"] > 0.9 * saved


def test_a_step_returns_the_trainable_tree_alone_and_all_of_it_moves():
    state, _ = one_step("align", 1, uneven_batch())
    before = start("align")[0]
    assert set(state.params) == {"projector"} and int(state.step) == 1
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), state.params, before.params)
    assert all(jax.tree.leaves(changed))


def test_no_compilation_after_the_first_step(data_folder):
    trainable, frozen = split_params(random_params(CONFIG), STAGES["align"])
    optimizer = adamw(STAGES["align"], lambda step: 1.0, **OPTIONS)
    step = jax.jit(make_train_step(AnswerLoss(MODEL, 16), optimizer, 1))
    state = TrainState(jnp.int32(0), trainable, optimizer.init(trainable))
    for batch in batches(data_folder):
        state, _ = step(state, frozen, batch)
    assert int(state.step) == len(batches(data_folder)) > 1 and step._cache_size() == 1
