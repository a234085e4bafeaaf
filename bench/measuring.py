"""From the command to the first data line: a set of the shape of LLaVA's 665K mix, measured.

    python -m bench.measuring --tokenizer=DIR --records=665000 --form=json --folder=runs/mix

Makes the set in `--folder`, unless it is there, and starts on it three times, each time in a
process of its own: with an empty cache, with what that start kept, and with 1% more records. A
start opens the records, checks and measures them, and plans an epoch; its CPU seconds are those of
all of its processes, its memory that of the largest. How many turns and tokens a record has, and
which have a picture, is as in the mix; words are drawn from the pages of docs/.
"""

import json
import re
import resource
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from absl import app, flags
from PIL import Image

TOKENIZER = flags.DEFINE_string("tokenizer", None, "Tokenizer folder.", required=True)
RECORDS = flags.DEFINE_integer("records", 665_000, "Records of the set.")
FORM = flags.DEFINE_enum("form", "json", ["json", "jsonl", "parquet"], "Kind of file.")
FOLDER = flags.DEFINE_string("folder", None, "Where the set is made.", required=True)
PROCESSES = flags.DEFINE_integer("processes", None, "That measure; by default as many as cores.")
TEXT_ONLY = flags.DEFINE_bool("text_only", False, "No pictures, whose files take most of a start.")

# The 665K mix by its parts: thousands of records, turns, tokens a turn, whether with a picture.
MIX = ((56.7, 3, 85, 1), (23.2, 1, 125, 1), (77.8, 1, 165, 1), (40.7, 4, 400, 0),
       (82.8, 5.4, 18, 1), (72.1, 10, 20, 1), (9.0, 1, 30, 1), (80.0, 5, 25, 1),
       (66.2, 1, 75, 1), (22.0, 1, 70, 1), (48.4, 8, 40, 1), (86.4, 10, 45, 1))  # fmt: skip
_PICTURES = 4096
_TOKENS_A_WORD = 1.4
_ROWS = 100_000  # of a Parquet file


def make(folder: Path, form: str, count: int, pictured: bool, start: int = 0) -> Path:
    """The set, or (with `start`) records added to it; the path that opens it."""
    rng = np.random.default_rng(start)
    text = " ".join(path.read_text() for path in sorted(Path("docs").rglob("*.md")))
    words = re.findall(r"[A-Za-z][a-z]*[,.]?", text)
    weights = np.array([part[0] for part in MIX])
    kinds = rng.choice(len(MIX), count, p=weights / weights.sum())
    if pictured and not start:
        (folder / "images").mkdir(parents=True)
        for number in range(_PICTURES):
            Image.new("RGB", (64, 48), (number % 256, 0, 0)).save(folder / f"images/{number}.jpg")

    def say(tokens: float) -> str:
        at = int(rng.integers(len(words)))
        return " ".join(words[at : at + max(int(tokens / _TOKENS_A_WORD), 1)])

    def record(number: int) -> dict:
        _, turns, tokens, has_picture = MIX[kinds[number - start]]
        talk = []
        for turn in range(1 + rng.poisson(turns - 1)):
            size = rng.gamma(4.0, tokens / 4)
            mark = "<image>\n" if has_picture and pictured and not turn else ""
            talk.append({"from": "human", "value": mark + say(size / 3) + "?"})
            talk.append({"from": "gpt", "value": say(size * 2 / 3)})
        image = {"image": f"images/{number % _PICTURES}.jpg"} if has_picture and pictured else {}
        return {"id": f"{number:09}"} | image | {"conversations": talk}

    numbers = range(start, start + count)
    if form == "parquet":
        import pyarrow
        import pyarrow.parquet

        for first in range(0, count, _ROWS):
            rows = [record(number) for number in numbers[first : first + _ROWS]]
            rows = [{"image": None} | row for row in rows]
            path = folder / f"train-{start + first:09}.parquet"
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return folder / "train-*.parquet"
    path = folder / f"data.{form}"
    with open(path, "r+" if start else "w") as file:
        if form == "jsonl":
            file.seek(0, 2)
            file.writelines(json.dumps(record(number)) + "\n" for number in numbers)
        else:
            file.seek(path.stat().st_size - 1 if start else 0)  # the bracket at its end
            for number in numbers:
                file.write(("," if number else "[") + json.dumps(record(number)))
            file.write("]")
    return path


def begin(path: Path, root: Path, cache: Path, tokenizer: str, processes: int | None) -> dict:
    """One start; run in a process of its own."""
    from llava_jax.data import measuring
    from llava_jax.data.pipeline import TrainingData
    from llava_jax.data.records import about, open_records
    from llava_jax.data.rows import RowFormat
    from llava_jax.models.images import ImageSpec
    from llava_jax.text.templates import get_template
    from llava_jax.text.tokenizer import load_tokenizer

    if processes is not None:
        measuring.processes_for = lambda work: processes
    began = time.perf_counter()
    row_format = RowFormat(get_template("v1"), ImageSpec(336), 576, max_length=2048, tiles=4)
    records = open_records(path, root, cache_dir=cache)
    options = {"batch_size": 128, "epochs": 1, "cache_dir": cache}
    data = TrainingData(records, load_tokenizer(tokenizer), row_format, **options)
    line, _, fingerprint = data.describe(), about(records), data.fingerprint
    seconds, used = (
        time.perf_counter() - began,
        [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)],
    )
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(sum(one.ru_utime + one.ru_stime for one in used), 1),
        "largest_process_mb": round(max(one.ru_maxrss for one in used) / 1024),
        "kept_mb": round(sum(file.stat().st_size for file in cache.iterdir()) / 1e6),
        "line": line,
        "fingerprint": fingerprint[:12],
    }


def main(_) -> None:
    folder, form, pictured = Path(FOLDER.value), FORM.value, not TEXT_ONLY.value
    path = folder / ("train-*.parquet" if form == "parquet" else f"data.{form}")
    cache = folder / "cache"
    if not folder.exists():
        folder.mkdir(parents=True)
        make(folder, form, RECORDS.value, pictured)
    size = sum(file.stat().st_size for file in folder.glob(path.name))
    print(f"{RECORDS.value:,} records, {size / 1e6:,.0f} MB of {form}", flush=True)
    shutil.rmtree(cache, ignore_errors=True)
    for what in ("cold", "warm", "1% more"):
        if what == "1% more":
            make(folder, form, RECORDS.value // 100, pictured, start=RECORDS.value)
        with ProcessPoolExecutor(1, get_context("spawn")) as alone:
            arguments = path, folder, cache, TOKENIZER.value, PROCESSES.value
            print(what, json.dumps(alone.submit(begin, *arguments).result()), flush=True)


if __name__ == "__main__":
    app.run(main)
