"""Model FLOPs against counts by hand."""

import dataclasses

import jax
import pytest

from llava_jax.models.presets import preset
from llava_jax.training import flops

CONFIG = preset("llava-1.5-7b")
# Weights that multiply a token in one layer of Llama 7B: q, k, v, o and the three of the MLP.
LAYER = 4 * 4096 * 4096 + 3 * 4096 * 11008
COUNTS = {"tokens": 1000, "attention_pairs": 300_000, "images": 2, "supervised_tokens": 100}


def test_decoder_by_hand():
    assert flops.decoder_flops_per_token(CONFIG) == 2 * 32 * LAYER == 12_952_010_752


def test_grouped_kv_heads_count_less():
    decoder = dataclasses.replace(CONFIG.decoder, num_kv_heads=8)
    fewer = 2 * 32 * (LAYER - 2 * 4096 * 3072)
    assert flops.decoder_flops_per_token(dataclasses.replace(CONFIG, decoder=decoder)) == fewer


def test_image_by_hand():
    vision, projector = flops.image_flops(CONFIG)
    weights = 2 * 577 * (4 * 1024 * 1024 + 2 * 1024 * 4096)
    scores = 4 * 577 * 577 * 1024  # queries with keys, and with values
    assert vision == 23 * (weights + scores) + 2 * 576 * 588 * 1024
    assert projector == 2 * 576 * (1024 * 4096 + 4096 * 4096)
    linear = dataclasses.replace(CONFIG, projector="linear")
    assert flops.image_flops(linear)[1] == 2 * 576 * 1024 * 4096
    assert flops.image_flops(dataclasses.replace(CONFIG, projector="identity"))[1] == 0


def test_a_step_of_each_stage_by_hand():
    """Stage 1 takes no gradient of decoder weights; stage 2 does; the encoder only runs forward."""
    decoder = 1000 * 2 * 32 * LAYER + 100 * 2 * 4096 * 32000
    scores = 300_000 * 4 * 32 * 4096
    vision, projector = flops.image_flops(CONFIG)
    stage_1 = 2 * decoder + 3 * scores + 2 * vision + 3 * 2 * projector
    assert flops.step_flops(CONFIG, {"projector"}, COUNTS) == pytest.approx(stage_1, rel=1e-12)
    stage_2 = stage_1 + decoder
    found = flops.step_flops(CONFIG, {"projector", "decoder"}, COUNTS)
    assert found == pytest.approx(stage_2, rel=1e-12)
    all_three = flops.step_flops(CONFIG, {"projector", "decoder", "vision"}, COUNTS)
    assert all_three == pytest.approx(stage_2 + 2 * 2 * vision, rel=1e-12)


def test_a_reference_is_one_forward_pass_more_but_for_a_frozen_encoder():
    decoder = 1000 * 2 * 32 * LAYER + 100 * 2 * 4096 * 32000
    scores = 300_000 * 4 * 32 * 4096
    vision, projector = flops.image_flops(CONFIG)
    more = lambda *parts: (
        flops.step_flops(CONFIG, {*parts}, COUNTS, reference=True)
        - flops.step_flops(CONFIG, {*parts}, COUNTS)
    )
    frozen = decoder + scores + 2 * projector
    assert more("projector", "decoder") == pytest.approx(frozen, rel=1e-9)
    assert more("lora") == pytest.approx(decoder + scores, rel=1e-9)
    whole = frozen + 2 * vision
    assert more("vision", "projector", "decoder") == pytest.approx(whole, rel=1e-9)


@pytest.mark.parametrize(
    "kind, peak",
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", None),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("TPU7x", 1153.5e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU v4", 275e12),
        ("cpu", None),
    ],
)
def test_peak_rates(kind, peak):
    assert flops.peak_flops(kind) == peak


def test_mfu_is_a_share_of_all_devices_and_unknown_on_a_cpu(monkeypatch):
    step, devices = flops.step_flops(CONFIG, {"projector"}, COUNTS), jax.devices()[:4]
    assert flops.mfu(step, 1.0, devices) is None
    monkeypatch.setattr(flops, "peak_flops", lambda kind: 100e12)
    assert flops.mfu(step, 0.5, devices) == pytest.approx(step / 0.5 / (4 * 100e12))
