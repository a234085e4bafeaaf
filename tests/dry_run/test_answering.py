"""Dry runs of answering: bytes against hand counts, the command on simulated devices and GPUs."""

import importlib.util
import json
from unittest import mock

import jax
import pytest

from llava_jax import cli
from llava_jax.dry_run.answering import (
    abstract_weights,
    decoding_speed,
    largest_prefills,
    model_config,
)
from llava_jax.dry_run.chips import CHIPS
from llava_jax.dry_run.report import bytes_on_a_device
from llava_jax.dry_run.topology import Topology
from llava_jax.errors import LlavaError
from llava_jax.inference import device
from llava_jax.inference.prefill import pack_prompts, prefill_shapes
from llava_jax.models.cache import PAGE
from llava_jax.models.presets import PRESETS, preset
from llava_jax.parallel.mesh import make_mesh
from tests.dry_run.test_gpu import with_compiler
from tests.dry_run.test_run import DECODER_7B, PROJECTOR_7B
from tests.tiny_model import CONFIG, random_params, tiny_llava
from tests.weights.family_models import family_model, save_family

KERNELS_7B = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 4096 * 32000
OUTPUTS_7B = 32 * (5 * 4096 + 2 * 11008) + 32000  # of those kernels, one scale each


def answer(capsys, *flags: str) -> tuple[int, dict]:
    """(exit status, the JSON object of the last line) of `llava-jax serve` with flags."""
    code = cli.main(["serve", "--checkpoint", "tiny", *flags])
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("tensor", [1, 2])
def test_the_command_on_simulated_devices(monkeypatch, capsys, tensor):
    monkeypatch.setitem(PRESETS, "tiny", CONFIG)
    flags = (f"--tensor={tensor}", "--batch_size=3", "--max_model_len=60", "--dry_run=cpu:8")
    code, figures = answer(capsys, *flags)
    assert code == 0 and figures["fits"]
    assert (figures["rows"], figures["slots"]) == (4, 64)
    d, sizes = CONFIG.decoder, figures["bytes"]
    cache = 2 * d.num_layers * 4 * 64 * d.num_kv_heads * d.head_dim * 4  # float32 keys and values
    assert sizes["cache"] == cache / tensor
    assert sizes["features"] == 64 * CONFIG.tokens_per_tile * d.hidden_size * 4
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(random_params(CONFIG)))
    assert whole / tensor <= sizes["weights"] <= whole
    assert sizes["needed"] > sizes["cache"] + sizes["weights"] + sizes["features"]
    assert {name.split()[0] for name in figures["programs"]} == {"encode", "read", "a"}


@pytest.mark.parametrize("all_shapes", [False, True])
def test_it_counts_the_programs_that_the_server_warms_up(monkeypatch, capsys, all_shapes):
    monkeypatch.setitem(PRESETS, "tiny", CONFIG)
    flags = ["--batch_size=3", "--max_model_len=60", "--dry_run=cpu:8"]
    _, figures = answer(capsys, *flags, *["--all_shapes"] * all_shapes)
    model, reports = tiny_llava(), []
    monkeypatch.setattr(device.Device, "lower", mock.MagicMock())  # compile nothing
    report = lambda done, count: reports.append((done, count))
    model.engine.warm_up(3, 60, report, few=not all_shapes)
    assert reports[-1] == (figures["warm_up"], figures["warm_up"])


def test_a_smaller_cache_is_counted_and_one_without_room_for_a_request_refused(monkeypatch, capsys):
    monkeypatch.setitem(PRESETS, "tiny", CONFIG)
    flags = ("--batch_size=8", "--max_model_len=60", "--dry_run=cpu:8")
    whole, small = (answer(capsys, *flags, *more)[1] for more in ((), ("--cache_tokens=128",)))
    assert whole["cache_tokens"] == 8 * 64 and small["cache_tokens"] == 128
    assert small["bytes"]["cache"] == whole["bytes"]["cache"] / 4
    refused = ["--cache_tokens=48", "--contrast"]
    for more, least in ((refused[:1], 64), (refused, 128)):
        assert cli.main(["serve", "--checkpoint=tiny", *flags, *more]) == 1
        assert "holds no request of 60 tokens" in (error := capsys.readouterr().err)
        assert f"give at least {least}" in error


def test_copies_share_the_rows(monkeypatch, capsys):
    monkeypatch.setitem(PRESETS, "tiny", CONFIG)
    flags = ("--batch_size=8", "--replicas=4", "--max_model_len=60", "--dry_run=cpu:8")
    assert answer(capsys, *flags)[1]["rows"] == 2


def test_the_prefills_that_can_need_most_memory():
    largest = largest_prefills(prefill_shapes(32, 2048, few=True))
    assert [(s.tokens, s.chunk, s.chunks, s.window) for s in largest] == [
        (4096, 64, 85, 2048),
        (2048, 16, 170, 2048),
    ]


@pytest.mark.slow
def test_no_prefill_of_the_server_needs_more_than_those_that_are_compiled():
    engine_device, needed = tiny_llava().engine.device, {}
    engine_device.reserve(32, 32 * 2048 // PAGE, 2048)
    engine_device.lower_encode(1)  # makes the store
    shapes = prefill_shapes(32, 2048, few=True)
    for shape in (s for s in shapes if s.tokens >= 2048 and s.window == 2048):
        prompts = pack_prompts([], shape, 32)
        lowered = engine_device.lower("prefill", engine_device.state, engine_device.store, prompts)
        needed[shape] = lowered.compile().memory_analysis().temp_size_in_bytes
    largest = max(needed[shape] for shape in largest_prefills(shapes))
    assert len(needed) == 7 and max(needed.values()) == largest > needed[shapes[-1]]


def test_more_devices_than_the_topology_has_are_refused(monkeypatch, capsys):
    monkeypatch.setitem(PRESETS, "tiny", CONFIG)
    assert cli.main(["serve", "--checkpoint=tiny", "--tensor=16", "--dry_run=cpu:8"]) == 1
    assert "cpu:8 has 8 devices" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flag", ["batch_size=0", "replicas=0", "tensor=0", "max_queue=0", "temperature=-1"]
)
def test_flags_are_checked_as_the_server_checks_them(monkeypatch, capsys, flag):
    monkeypatch.setitem(PRESETS, "tiny", CONFIG)
    assert cli.main(["serve", "--checkpoint=tiny", "--dry_run=cpu:8", f"--{flag}"]) == 1
    assert flag.split("=")[0] in capsys.readouterr().err


def test_the_mode_of_pictures_is_the_one_asked_for(monkeypatch, tmp_path):
    folder = str(save_family(tmp_path / "model", family_model("llava_next")))
    picture = {"pinpoint_order": None, "image_mode": None}
    assert model_config(folder, picture).image.tiling
    assert not model_config(folder, picture | {"image_mode": "pad"}).image.tiling
    turned = model_config(folder, picture | {"pinpoint_order": "original"}).image.tiling
    assert turned != model_config(folder, picture).image.tiling
    monkeypatch.setitem(PRESETS, "tiny", CONFIG)
    for given in ({"image_mode": "pad"}, {"pinpoint_order": "hf"}):
        with pytest.raises(LlavaError, match=f"tiny is a preset, .*leave out --{[*given][0]}"):
            model_config("tiny", picture | given)


@pytest.mark.parametrize("tensor", [1, 4])
@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_the_weights_of_7b(tensor, quantize):
    mesh = make_mesh(1, 1, tensor, jax.devices()[:tensor])
    params = abstract_weights(preset("llava-1.5-7b"), mesh, "bfloat16", quantize)
    parts = {name: bytes_on_a_device(part) for name, part in params.items()}
    wanted = 2 * DECODER_7B
    if quantize == "int8":  # a byte a weight, and float32 scales
        wanted += -KERNELS_7B + 4 * OUTPUTS_7B
    if quantize == "int4":  # half a byte, and bfloat16 scales of 32 inputs; the head has a byte
        head = 4096 * 32000
        wanted += (-1.5 + 2 / 32) * (KERNELS_7B - head) - head + 4 * 32000
    norms = 2 * 65 * 4096
    assert parts["decoder"] == pytest.approx((wanted - norms) / tensor + norms, rel=1e-3)
    assert parts["projector"] < 2.01 * PROJECTOR_7B


def test_the_speed_of_decoding_by_the_memory():
    config, mesh = preset("llava-1.5-7b"), make_mesh(1, 1, 1, jax.devices()[:1])
    params = abstract_weights(config, mesh, "bfloat16", None)
    where = Topology("h100:1", (None,), (1,), CHIPS["h100"])
    row = 2 * 32 * 2048 * 32 * 128 * 2  # keys and values of every layer
    figures = {"tensor": 1, "rows": 4, "slots": 2048, "cache_tokens": 4 * 2048}
    figures["bytes"] = {"cache": 4 * row}
    speed = decoding_speed(config, params, where, figures)
    weights = 2 * (DECODER_7B - 32000 * 4096)  # not the table of embeddings
    assert sorted(speed) == [1, 4, 8, 32, 128]
    assert speed[32]["bytes"] == weights + 32 * row
    bandwidth = CHIPS["h100"].hbm_bandwidth
    assert speed[32]["tokens_per_second"] == pytest.approx(32 * bandwidth / (weights + 32 * row))
    guessing = decoding_speed(config, params, where, figures, lookup=4)
    none, every = guessing[32].pop("guessing").values()  # a pass still waits for memory
    assert guessing[32] == speed[32] and none == speed[32]["tokens_per_second"] == every / 5
    short = figures | {"bytes": {"cache": 4 * row / 64}}  # of many rows the products take longer
    of_many = decoding_speed(config, params, where, short, lookup=4)[128]
    none, every = of_many["guessing"].values()
    assert none < of_many["tokens_per_second"] < every == 5 * none


@with_compiler
def test_the_command_on_a_gpu(monkeypatch, capsys):
    monkeypatch.setitem(PRESETS, "tiny", CONFIG)
    code, figures = answer(capsys, "--dry_run=h100:1", "--dtype=auto", "--max_model_len=60")
    assert code == 0 and figures["dtype"] == "bfloat16"
    assert figures["room"]["rows"] >= figures["rows"] and figures["room"]["slots"] > 64
    assert figures["decoding"]["8"]["tokens_per_second"] > 0


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs the TPU compiler")
def test_the_command_on_a_tpu(monkeypatch, capsys):
    monkeypatch.setitem(PRESETS, "tiny", CONFIG)
    code, figures = answer(capsys, "--dry_run=v5e:1x1", "--dtype=auto", "--max_model_len=60")
    assert code == 0 and figures["decoding"]["8"]["bytes"] > figures["bytes"]["cache"]
