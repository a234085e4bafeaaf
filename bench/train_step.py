"""Our training step against Hugging Face's with PyTorch: same model, batches and dtype, one run.

    python -m bench.train_step --config=configs/easy_vqa_align.py --config.model.dtype=float32

Each side runs in a process of its own. They take turns of a few steps, and the idle one sleeps;
with --apart it ends and starts again for its next turn, for a card that cannot hold both. Both see
the same packed batches. If config.init names an encoder and a decoder, both start from them, and
the losses of the first steps show that both compute the same. Otherwise parameters and batches are
random, in the shapes of the recipe.

The other side is LlavaForConditionalGeneration, or the class of LLaVA-NeXT or OneVision, in eager
mode, with sdpa attention under a mask that separates packed conversations, only the tiles that are
there, and fused AdamW with float32 state. Prints real tokens a second (median and best of all
blocks), the ratio, and the peak memory.
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

from bench.huggingface_training import start_theirs
from configs import base
from llava_jax import command
from llava_jax.data.media import inspect_image
from llava_jax.data.rows import RowFormat, pack
from llava_jax.dry_run.estimate import SIZES
from llava_jax.errors import LlavaError
from llava_jax.models.images import TEXT
from llava_jax.models.llava import LlavaConfig
from llava_jax.text.tokenization import IGNORE_INDEX, TokenRow
from llava_jax.training import recipe

CONFIG = config_flags.DEFINE_config_file("config", None, "The stage to time.", lock_config=True)
BLOCKS = flags.DEFINE_integer("blocks", 5, "Turns of each side.")
STEPS = flags.DEFINE_integer("steps", 3, "Steps a turn.")
APART = flags.DEFINE_bool("apart", False, "Only one side's process at a time.")
THREADS = flags.DEFINE_integer("threads", os.cpu_count(), "Threads of PyTorch on CPU.")


def real_batches(config: ConfigDict, model: LlavaConfig, count: int) -> list[dict]:
    """The first packed batches of the stage; with `sizes` where tiles depend on them."""
    from llava_jax.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(recipe.tokenizer_folder(config), model.decoder.vocab_size)
    data = one_device(config).training_data(tokenizer, epochs=None, steps=count, cache_dir=None)
    batches = list(data.batch_iterator())
    if not model.image.by_size:
        return [batch.arrays for batch in batches]
    return [batch.arrays | {"sizes": picture_sizes(data.records, batch)} for batch in batches]


def picture_sizes(records, batch) -> np.ndarray:
    """int[n, 3]: width, height and number of the conversation of each picture of a batch."""
    numbers = {records[i].id: i for i in range(len(records))}
    found = []
    for conversation, record_id in enumerate(batch.record_ids):
        for image in records[numbers[record_id]].images:
            found.append((*inspect_image(image), conversation))
    return np.array(found).reshape(-1, 3)


def one_device(config: ConfigDict):
    """The stage of a config on a single device."""
    import jax

    from llava_jax.training.stage import Stage

    alone = ConfigDict(config.to_dict())
    alone.mesh = ConfigDict({"data": 1, "fsdp": 1, "tensor": 1})
    return Stage.of(alone, jax.devices()[:1])


def random_batch(config: ConfigDict, model: LlavaConfig) -> dict:
    """Full rows of one conversation: pictures first, the last third supervised.

    Where tiles depend on the size of a picture: see `random_tiled_batch`.
    """
    rng, rows = np.random.default_rng(0), config.batch_size
    row_format = recipe.row_format(config, model)
    if model.image.by_size:
        return random_tiled_batch(rng, rows, row_format, model.decoder.vocab_size)
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


def random_tiled_batch(rng, rows: int, row_format: RowFormat, vocabulary: int) -> dict:
    """Rows packed with conversations about one picture each, of the sizes of `estimate.SIZES`.

    An answer of 60 tokens follows a question of 40. `sizes` come with the arrays.
    """
    packed, sizes, number = [], [], 0
    for _ in range(rows):
        conversations, pictures, room = [], [], [row_format.length, row_format.tiles]
        while True:
            size = SIZES[number % len(SIZES)]
            (layout,) = row_format.layouts([size])
            count = len(layout)
            room = [room[0] - count - 100, room[1] - layout.tiles]
            if min(room) < 0:
                break
            ids = rng.integers(0, vocabulary - 1, count + 100).astype(np.int32)
            ids[:count] = row_format.image_token_id
            labels = np.where(np.arange(len(ids)) >= count + 40, ids, IGNORE_INDEX)
            offsets = np.zeros((len(ids), 2), np.int64)
            conversations.append(TokenRow(ids, labels.astype(np.int32), ((0, count),), offsets))
            side = row_format.image.size
            pixels = rng.integers(0, 256, (layout.tiles, side, side, 3), np.uint8)
            pictures.append((layout, pixels))
            sizes.append((*size, number))
            number += 1
        if not conversations:
            raise LlavaError(f"a row has no room for a picture of {size[0]}x{size[1]} pixels")
        packed.append(pack(conversations, pictures, row_format))
    batch = {name: np.stack([row[name] for row in packed]) for name in packed[0]}
    return batch | {"sizes": np.array(sizes)}


def start_ours(config: ConfigDict, batches: list[dict]):
    """(function that runs step i and gives its loss, function for peak bytes on the device)."""
    import flax.linen as nn
    import jax
    import jax.numpy as jnp

    from llava_jax.models.llava import init_params
    from llava_jax.training.state import fresh_state, place

    stage = one_device(config)
    batches = [{k: v for k, v in batch.items() if k != "sizes"} for batch in batches]
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
