"""Images a second of the input pipeline: decode, resize, tokenize and pack, by number of workers.

    python -m bench.input_pipeline --config=configs/easy_vqa_instruct.py --workers=0,1,2

Reads the recipe's data as training does, with each number of workers for `--seconds`, after a
moment to warm up; 0 workers means threads of this process. `--pictures=640x480`, the size of COCO's
pictures, makes JPEGs of that size and reads them in place of the recipe's data, from each of
`--sources`: files of their own, one Parquet file as `datasets` writes it, a tar. The pages of this
Parquet file stay in memory, unlike those of a large set in random order. With several sources the
rounds take turns, `--rounds` of each, and the median counts: a machine's other work then falls on
all of them.
"""

import collections
import io
import json
import os
import statistics
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
from absl import flags
from ml_collections import config_flags
from PIL import Image

from configs import base
from llava_jax import command
from llava_jax.data.pipeline import TrainingData
from llava_jax.text.tokenizer import load_tokenizer
from llava_jax.training import recipe
from llava_jax.training.stage import Stage

CONFIG = config_flags.DEFINE_config_file("config", None, "The stage whose data to read.")
WORKERS = flags.DEFINE_list("workers", ["0", str(os.cpu_count())], "Numbers of worker processes.")
SECONDS = flags.DEFINE_float("seconds", 10.0, "Measured for each of them.")
SOURCES = flags.DEFINE_list("sources", ["files"], "With --pictures: files, parquet, tar.")
ROUNDS = flags.DEFINE_integer("rounds", 1, "Measurements of each source.")
PICTURES = flags.DEFINE_string("pictures", "", "WIDTHxHEIGHT of JPEGs to make; empty: real data.")


def make_pictures(folder: Path, width: int, height: int, count: int = 256) -> None:
    """Photo-like JPEGs (smooth, with some noise) with one question each: data.json and others."""
    rng, records = np.random.default_rng(0), []
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8))
        pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
        noisy = np.clip(pixels + rng.integers(-12, 13, pixels.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{i}.jpg", quality=90)
        turns = [("human", "<image>\nWhat is this?"), ("gpt", f"Picture {i} of many.")]
        conversation = [{"from": who, "value": text} for who, text in turns]
        records.append({"id": str(i), "image": f"{i}.jpg", "conversations": conversation})
    (folder / "data.json").write_text(json.dumps(records))
    rows, jpeg = [], lambda record: (folder / record["image"]).read_bytes()
    for record in records:
        rows.append(record | {"image": {"bytes": jpeg(record), "path": record["image"]}})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "data.parquet")
    with tarfile.open(folder / "data.tar", "w") as tar:
        for record in records:
            text = json.dumps({"conversations": record["conversations"]}).encode()
            for suffix, data in (("jpg", jpeg(record)), ("json", text)):
                member = tarfile.TarInfo(f"{record['id']}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def measure(data: TrainingData, seconds: float) -> dict:
    """Rates over `seconds`, and the median and longest wait for a batch.

    images_per_cpu_second: of this process alone, so of 0 workers; other programs do not change it.
    """
    batches = data.batch_iterator()
    for _ in range(3):
        next(batches)
    images = tokens = 0
    waits, began, began_work = [], time.perf_counter(), time.process_time()
    while time.perf_counter() - began < seconds:
        asked = time.perf_counter()
        arrays = next(batches).arrays
        waits.append(time.perf_counter() - asked)
        last = arrays["feature_ids"].reshape(len(arrays["tiles"]), -1).max(axis=1)  # of each row
        images += int((last // data.row_format.tokens_per_tile + 1).sum())
        tokens += int((arrays["segment_ids"] != 0).sum())
    elapsed, worked = time.perf_counter() - began, time.process_time() - began_work
    return {
        "images_per_second": images / elapsed,
        "tokens_per_second": tokens / elapsed,
        "median_wait_seconds": statistics.median(waits),
        "longest_wait_seconds": max(waits),
        "images_per_cpu_second": images / worked,
    }


def main() -> None:
    config = CONFIG.value
    files = {"files": "data.json", "parquet": "data.parquet", "tar": "data.tar"}
    with tempfile.TemporaryDirectory() as folder:
        sources = {"": config.data.train}
        if PICTURES.value:
            make_pictures(Path(folder), *map(int, PICTURES.value.split("x")))
            sources = {name: f"{folder}/{files[name]}" for name in SOURCES.value}
            config.data.image_root = folder
        print(
            f"{'source':>8} {'workers':>8} {'images/s':>10} {'tokens/s':>10} {'median wait':>12} "
            f"{'longest':>9} {'images/CPU s':>13}"
        )
        results = {}
        for workers in map(int, WORKERS.value):
            found = collections.defaultdict(list)
            for _ in range(ROUNDS.value):
                for name, path in sources.items():
                    config.data.train = path
                    found[name].append(measure(_data(config, workers), SECONDS.value))
            for name, rounds in found.items():
                one = {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}
                results[f"{name} {workers}".strip()] = one
                rates, waits = list(one.values())[:2], list(one.values())[2:4]
                print(f"{name:>8} {workers:8} {rates[0]:10,.1f} {rates[1]:10,.0f} ", end="")
                print(f"{waits[0]:10.3f} s {waits[1]:7.3f} s ", end="")
                print(f"{one['images_per_cpu_second']:13.1f}" if not workers else "", flush=True)
    print(json.dumps(results))


def _data(config, workers: int) -> TrainingData:
    stage = Stage.of(config)
    rows = stage.model.config.decoder.vocab_size
    tokenizer = load_tokenizer(recipe.tokenizer_folder(config), rows)
    changes = {"epochs": None, "steps": 10**6, "workers": workers, "progress": False}
    return stage.training_data(tokenizer, **changes, cache_dir=None)


if __name__ == "__main__":
    command.run(main, base=base)
