"""Reads batches of two workers in a process of its own: JSON, image root, tokenizer, steps.

Keeps the arrays of the last batch until the interpreter exits, as a training run does.
"""

import sys
import time

from llava_jax.data.pipeline import TrainingData
from llava_jax.data.records import open_records
from llava_jax.data.rows import RowFormat
from llava_jax.models.images import ImageSpec
from llava_jax.text.templates import get_template
from llava_jax.text.tokenizer import load_tokenizer

kept = []


def main(path: str, root: str, tokenizer: str, steps: int) -> None:
    row_format = RowFormat(get_template("chatml"), ImageSpec(28), 4, max_length=128, tiles=4)
    options = {"batch_size": 2, "steps": 12, "workers": 2, "progress": False}
    data = TrainingData(open_records(path, root), load_tokenizer(tokenizer), row_format, **options)
    batches = data.batch_iterator()
    kept.append(batches if steps < 12 else None)  # a run that is stopped keeps its iterator
    for _ in range(steps):
        kept[1:] = [next(batches).arrays]
    if steps < 12:
        batches.close()
    del batches
    time.sleep(1)  # Grain frees memory in a thread; a run saves a checkpoint meanwhile
    print("read", len(kept[1]))


if __name__ == "__main__":
    main(*sys.argv[1:4], int(sys.argv[4]))
