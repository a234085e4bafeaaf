"""Our training step against Hugging Face's with PyTorch: same model, batches and dtype, one run.

    python -m bench.train_step --config=configs/easy_vqa_align.py --config.model.dtype=float32

Each side runs in a process of its own. They take turns of a few steps, and the idle one sleeps;
with --apart it ends and starts again for its next turn, for a card that cannot hold both. Both see
the same packed batches. If config.init names an encoder and a decoder, both start from them, and
the losses of the first steps show that both compute the same. Otherwise parameters and batches are
random, in the shapes of the recipe.

The other side is LlavaForConditionalGeneration in eager mode, with sdpa attention under a mask that
separates packed conversations, only the pictures that are there, and fused AdamW with float32
state. Prints real tokens a second (median and best of all blocks), the ratio, and the peak memory.
"""

import dataclasses
import gc
import json
import multiprocessing
import os
import resource
import statistics
import time
from pathlib import Path

import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags

from configs import base
from llava_jax import command
from llava_jax.errors import LlavaError
from llava_jax.models.images import TEXT
from llava_jax.models.llava import LlavaConfig
from llava_jax.text.tokenization import IGNORE_INDEX
from llava_jax.training import recipe

CONFIG = config_flags.DEFINE_config_file("config", None, "The stage to time.", lock_config=True)
BLOCKS = flags.DEFINE_integer("blocks", 5, "Turns of each side.")
STEPS = flags.DEFINE_integer("steps", 3, "Steps a turn.")
APART = flags.DEFINE_bool("apart", False, "Only one side's process at a time.")
THREADS = flags.DEFINE_integer("threads", os.cpu_count(), "Threads of PyTorch on CPU.")


def real_batches(config: ConfigDict, model: LlavaConfig, count: int) -> list[dict]:
    """The first packed batches of the stage."""
    from llava_jax.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(recipe.tokenizer_folder(config), model.decoder.vocab_size)
    data = one_device(config).training_data(tokenizer, epochs=None, steps=count, cache_dir=None)
    return [batch.arrays for batch in data.batch_iterator()]


def one_device(config: ConfigDict):
    """The stage of a config on a single device."""
    import jax

    from llava_jax.training.stage import Stage

    alone = ConfigDict(config.to_dict())
    alone.mesh = ConfigDict({"data": 1, "fsdp": 1, "tensor": 1})
    return Stage.of(alone, jax.devices()[:1])


def random_batch(config: ConfigDict, model: LlavaConfig) -> dict:
    """Full rows of one conversation: pictures first, the last third supervised."""
    rng, rows = np.random.default_rng(0), config.batch_size
    row_format = recipe.row_format(config, model)
    length = row_format.length
    tiles = min(row_format.tiles, length // model.tokens_per_tile)
    spec = dataclasses.replace(row_format, tiles=tiles).row_spec()
    shown = tiles * model.tokens_per_tile
    positions = np.arange(length, dtype=np.int32)
    ids = rng.integers(0, model.decoder.vocab_size - 1, (rows, length)).astype(np.int32)
    ids[:, :shown] = model.image_token_id
    each = {
        "position_ids": positions,
        "segment_ids": np.ones(length, np.int32),
        "feature_ids": np.where(positions < shown, positions, TEXT),
        "feature_places": np.arange(shown, dtype=np.int32),
    }
    return {name: np.tile(array, (rows, 1)) for name, array in each.items()} | {
        "input_ids": ids,
        "labels": np.where(positions >= max(shown, length * 2 // 3), ids, IGNORE_INDEX),
        "tiles": rng.integers(0, 256, (rows, *spec["tiles"][0]), np.uint8),
    }


def start_ours(config: ConfigDict, batches: list[dict]):
    """(function that runs step i and gives its loss, function for peak bytes on the device)."""
    import flax.linen as nn
    import jax
    import jax.numpy as jnp

    from llava_jax.models.llava import init_params
    from llava_jax.training.state import fresh_state, place

    stage = one_device(config)
    optimizer = stage.optimizer(lambda step: 1.0)
    if config.init.vision:
        state, frozen = stage.starting_state(recipe.starting_sources(config), optimizer)
    else:
        fresh = lambda: nn.meta.unbox(init_params(stage.model.config, jax.random.key(0)))
        params = jax.jit(fresh)()
        state = fresh_state(stage.state, params, optimizer)
        frozen = place(params, stage.frozen)
        del params
    with stage.scope():
        step = stage.compile_step(optimizer, state, frozen, batches[0])

    def run(i: int) -> float:
        nonlocal state
        state, metrics = step(state, frozen, jax.tree.map(jnp.asarray, batches[i % len(batches)]))
        return float(metrics["loss"])

    device = jax.devices()[0]
    return run, lambda: (device.memory_stats() or {}).get("peak_bytes_in_use")


def huggingface_config(shape: LlavaConfig):
    """The transformers config of our shape; its image token is an id of its own, the last."""
    import transformers

    v, d = shape.vision, shape.decoder
    common = dict(
        hidden_size=v.hidden_size,
        num_hidden_layers=v.num_layers,
        num_attention_heads=v.num_heads,
        patch_size=v.patch_size,
        image_size=v.image_size,
        hidden_act=v.hidden_act,
        layer_norm_eps=v.layer_norm_eps,
    )
    if v.layer_scale:
        vision = transformers.Dinov2Config(**common, mlp_ratio=v.intermediate_size // v.hidden_size)
    else:
        vision = transformers.CLIPVisionConfig(**common, intermediate_size=v.intermediate_size)
    text = transformers.LlamaConfig(
        vocab_size=d.vocab_size + 1,
        hidden_size=d.hidden_size,
        intermediate_size=d.intermediate_size,
        num_hidden_layers=d.num_layers,
        num_attention_heads=d.num_heads,
        num_key_value_heads=d.num_kv_heads,
        head_dim=d.head_dim,
        rms_norm_eps=d.rms_norm_eps,
        rope_theta=d.rope_theta,
        tie_word_embeddings=d.tie_word_embeddings,
        max_position_embeddings=d.max_position_embeddings,
    )
    return transformers.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=d.vocab_size,
        vision_feature_layer=shape.feature_layer,
        projector_hidden_act="gelu",
        tie_word_embeddings=d.tie_word_embeddings,
    )


def make_huggingface(config: ConfigDict, shape: LlavaConfig, projector: dict, device: str):
    """The model of transformers, with the parameters that the recipe names, if any."""
    import torch
    import transformers

    with torch.device(device):
        model = transformers.LlavaForConditionalGeneration._from_config(
            huggingface_config(shape), attn_implementation="sdpa", dtype=torch.float32
        )
    if not config.init.vision:
        return model
    inner = model.model
    vision = transformers.AutoModel.from_pretrained(config.init.vision)
    missing, extra = inner.vision_tower.load_state_dict(vision.state_dict(), strict=False)
    assert set(missing) <= {"embeddings.mask_token"} and not extra
    decoder = transformers.AutoModelForCausalLM.from_pretrained(config.init.decoder)
    rows = shape.decoder.vocab_size
    with torch.no_grad():
        for name, tensor in decoder.model.state_dict().items():
            inner.language_model.get_parameter(name)[: len(tensor)] = tensor
        if not shape.decoder.tie_word_embeddings:
            model.lm_head.weight[:rows] = decoder.lm_head.weight
        for i, layer in enumerate(("linear_1", "linear_2")):
            ours = projector[f"linear_{i}"]
            theirs = getattr(inner.multi_modal_projector, layer)
            theirs.weight.copy_(torch.from_numpy(ours["kernel"].T.copy()))
            theirs.bias.copy_(torch.from_numpy(ours["bias"].copy()))
    return model


def prepare(batch: dict, shape: LlavaConfig, device: str) -> dict:
    """One of our packed batches as the model of transformers takes it."""
    import torch

    ids, segments = batch["input_ids"], batch["segment_ids"]
    allowed = np.tril(segments[:, :, None] == segments[:, None, :])
    used = batch["feature_ids"].max(1) // shape.tokens_per_tile + 1
    images = np.concatenate([row[:n] for row, n in zip(batch["tiles"], used, strict=True)])
    pixels = (images / np.float32(255) - shape.image.mean) / shape.image.std
    arrays = {
        "input_ids": np.where(ids == shape.image_token_id, shape.decoder.vocab_size, ids),
        "labels": batch["labels"],
        "position_ids": batch["position_ids"],
        "pixel_values": pixels.transpose(0, 3, 1, 2).astype(np.float32),
    }
    if (segments != 1).any():  # whole rows of one conversation need no mask: flash attention
        arrays["attention_mask"] = allowed[:, None]
    tensors = {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in arrays.items()}
    for name in ("input_ids", "labels", "position_ids"):
        tensors[name] = tensors[name].long()
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def start_theirs(config: ConfigDict, batches: list[dict], projector: dict, threads: int):
    """The same as `start_ours`, with transformers and PyTorch."""
    import torch

    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)  # else its steps slow down many times over
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape, o = recipe.model_config(config), config.optimizer
    model = make_huggingface(config, shape, projector, device).train()
    autocast = config.model.dtype != "float32"
    if autocast and o.moments_dtype != "float32":  # parameters and state in 16 bits, to fit
        model, autocast = model.to(torch.bfloat16), False
    names = {
        "vision": "model.vision_tower",
        "projector": "model.multi_modal_projector",
        "decoder": ("model.language_model", "lm_head"),
    }
    groups = []
    model.requires_grad_(False)
    for component, rate in config.trainable.items():
        chosen = [p for n, p in model.named_parameters() if n.startswith(names[component])]
        groups.append({"params": [p.requires_grad_(True) for p in chosen], "lr": rate})
    trained = [p for group in groups for p in group["params"]]
    optimizer = torch.optim.AdamW(
        groups, betas=(o.b1, o.b2), eps=o.eps, weight_decay=o.weight_decay, fused=True
    )
    if config.model.remat_policy in ("attention", "full"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    prepared = [prepare(batch, shape, device) for batch in batches]
    for arrays in prepared:
        arrays["pixel_values"] = arrays["pixel_values"].to(model.dtype)

    def run(i: int) -> float:
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            loss = model(**prepared[i % len(prepared)]).loss
        loss.backward()
        if o.clip_norm:
            torch.nn.utils.clip_grad_norm_(trained, o.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return run, lambda: torch.cuda.max_memory_allocated() if device == "cuda" else None


def side(start, connection, *arguments) -> None:
    """A process: prepares, then runs as many steps as it is sent, and answers (losses, seconds)."""
    run, device_peak = start(*arguments)
    losses = [run(0), run(1)]  # the first calls are slower
    gc.collect()
    forget_peak()
    connection.send(losses)
    step = 2
    while (count := connection.recv()) is not None:
        began = time.perf_counter()
        for _ in range(count):
            run(step)
            step += 1
        connection.send(time.perf_counter() - began)
    connection.send(device_peak() or host_peak())


def forget_peak() -> None:
    """Resets the process's peak of resident memory, if Linux allows it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def host_peak() -> int:
    """Peak resident bytes since `forget_peak`."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    config = CONFIG.value
    shape = recipe.model_config(config)
    if config.init.vision:
        batches = real_batches(config, shape, 4)
        projector = recipe.starting_params(shape, None, {}, {"projector"}, config.seed)["projector"]
    else:
        batches, projector = [random_batch(config, shape)], {}
    tokens = [int((batch["segment_ids"] != 0).sum()) for batch in batches]
    context = multiprocessing.get_context("spawn")
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    starts = {
        "llava_jax": (start_ours, ()),
        "pytorch": (start_theirs, (projector, THREADS.value)),
    }

    def begin(name: str):
        """(process, pipe) of a side that is ready for its first turn, and the losses so far."""
        start, more = starts[name]
        here, there = context.Pipe()
        process = context.Process(target=side, args=(start, there, config, batches, *more))
        process.start()
        there.close()  # so that the end of the process is seen
        return (process, here), heard(name, here)

    running, speeds, peaks = {}, {name: [] for name in starts}, {name: [] for name in starts}
    for block in range(BLOCKS.value):
        for name in starts:
            done = 2 + (0 if APART.value else block * STEPS.value)
            work = sum(tokens[i % len(tokens)] for i in range(done, done + STEPS.value))
            if name not in running:
                running[name], losses = begin(name)
                if block == 0:
                    print(f"{name}: losses of the first two steps {losses}", flush=True)
            pipe = running[name][1]
            pipe.send(STEPS.value)
            speeds[name].append(work / heard(name, pipe))
            if APART.value or block == BLOCKS.value - 1:
                peaks[name].append(stop(*running.pop(name)))
    report(speeds, {name: max(found) for name, found in peaks.items()})


def heard(name: str, pipe):
    """The next message of a side."""
    try:
        return pipe.recv()
    except EOFError:
        raise LlavaError(f"the process of {name} has ended: its output is above") from None


def stop(process, pipe) -> int:
    """Ends a side; gives its peak bytes."""
    pipe.send(None)
    peak = pipe.recv()
    process.join()
    return peak


def report(speeds: dict, peaks: dict) -> None:
    print(f"{'':10} {'tokens/s':>10} {'best':>10} {'peak GB':>8}")
    for name, found in speeds.items():
        print(
            f"{name:10} {statistics.median(found):10,.0f} {max(found):10,.0f} "
            f"{peaks[name] / 1e9:8.2f}"
        )
    pairs = list(zip(speeds["llava_jax"], speeds["pytorch"], strict=True))
    ratio = statistics.median(ours / theirs for ours, theirs in pairs)
    memory = peaks["llava_jax"] / peaks["pytorch"]
    print(f"speed ratio {ratio:.2f} (median over turns), memory ratio {memory:.2f}")
    print(json.dumps({"speed_ratio": ratio, "memory_ratio": memory, "tokens_per_second": speeds}))


if __name__ == "__main__":
    command.run(main, base=base)
