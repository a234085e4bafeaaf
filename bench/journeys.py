"""How far a value travels through the code: the functions of ours that it meets, in their order.

    python -m bench.journeys picture
    python -m bench.journeys prompt

A function counts when it is entered for the first time; a change of file is counted where the next
new function is in another file than the one before. Comprehensions, lambdas and module bodies count
as part of what holds them.

`picture`: from a file with one JSON record to the first batch of NumPy arrays.
`prompt`: from a question about a picture to the text of its answer.
"""

import contextlib
import json
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np

PACKAGE = str(Path(__file__).parent.parent / "llava_jax") + os.sep


@contextlib.contextmanager
def recorded() -> Iterator[list[tuple[str, str]]]:
    """(file, function) of each function of llava_jax entered for the first time, in any thread."""
    journey, seen = [], set()

    def enter(frame, event, argument) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(PACKAGE):
            return
        if code in seen or code.co_name.startswith("<"):
            return
        seen.add(code)
        journey.append((code.co_filename.removeprefix(PACKAGE), code.co_qualname))

    threading.setprofile(enter)
    sys.setprofile(enter)
    try:
        yield journey
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


def report(journey: list[tuple[str, str]]) -> None:
    """Prints the journey, a line for each stay in a file, and its three figures."""
    stays: list[tuple[str, list[str]]] = []
    for file, function in journey:
        if not stays or stays[-1][0] != file:
            stays.append((file, []))
        stays[-1][1].append(function)
    for file, functions in stays:
        print(f"{file}: {', '.join(functions)}")
    files = len({file for file, _ in stays})
    print(f"{len(journey)} functions in {files} files, {len(stays) - 1} changes of file")


def picture() -> list[tuple[str, str]]:
    """From a JSON record with one picture to the first batch."""
    from PIL import Image

    from llava_jax.data.pipeline import TrainingData
    from llava_jax.data.records import open_records
    from llava_jax.data.rows import RowFormat
    from llava_jax.models.presets import preset
    from tests.tiny_model import byte_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
        Image.fromarray(pixels).save(f"{folder}/cat.png")
        turns = [("human", "<image>\nWhat is this?"), ("gpt", "A cat.")]
        conversation = [{"from": who, "value": text} for who, text in turns]
        record = {"id": "7", "image": "cat.png", "conversations": conversation}
        Path(f"{folder}/data.json").write_text(json.dumps([record]))
        options = {"batch_size": 1, "epochs": 1, "threads": 1, "progress": False}
        tokenizer, model = byte_tokenizer(), preset("llava-1.5-7b")
        import grain  # noqa: F401  it is loaded late, and none of it is ours

        row_format = RowFormat.of(model, "v1", max_length=1024, tiles=1)
        with recorded() as journey:
            records = open_records(f"{folder}/data.json")
            data = TrainingData(records, tokenizer, row_format, **options)
            next(data.batch_iterator())
    return journey


def prompt() -> list[tuple[str, str]]:
    """From a question about a picture to the text of its answer, with a model of random weights."""
    from tests.tiny_model import random_image, tiny_llava

    llava, image = tiny_llava(), random_image(0)
    with recorded() as journey:
        llava.chat("What is this?", image, max_tokens=4)
    return journey


JOURNEYS = {"picture": picture, "prompt": prompt}


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1] not in JOURNEYS:
        sys.exit(f"usage: python -m bench.journeys {'|'.join(JOURNEYS)}")
    report(JOURNEYS[sys.argv[1]]())


if __name__ == "__main__":
    main()
