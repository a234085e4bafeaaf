"""A small set of records with images, and the tokenizers of tests/text."""

import argparse
import json

import numpy as np
import pytest
from PIL import Image

from tests.text.conftest import sentencepiece_folder, tokenizer_folder, tokenizers  # noqa: F401


def record(record_id, question="<image>\nWhat color?", answer="blue", image=None):
    item = {
        "id": record_id,
        "conversations": [
            {"from": "human", "value": question},
            {"from": "gpt", "value": answer},
        ],
    }
    return item | ({} if image is None else {"image": image})


@pytest.fixture
def data_set(tmp_path):
    """(JSON file, image root): 24 records, some with two images, some with none."""
    root = tmp_path / "images"
    (root / "a").mkdir(parents=True)
    random = np.random.default_rng(0)
    items = []
    for i in range(24):
        names = [f"a/{i}.png"] if i % 4 else [] if i % 8 else [f"a/{i}.png", f"a/{i}b.png"]
        for name in names:
            pixels = random.integers(0, 256, (20 + i, 31, 3), np.uint8)
            Image.fromarray(pixels).save(root / name)
        question = "<image> and <image>?" if len(names) == 2 else "<image>\n" * len(names) + "What?"
        item = record(f"r{i}", question, "blue " * (1 + i % 5), names or None)
        if i % 3 == 0:
            item["conversations"] += record("", "and 你好?", "yes")["conversations"]
        items.append(item)
    path = tmp_path / "data.json"
    path.write_text(json.dumps(items))
    return path, root


@pytest.fixture
def run():
    """run(module, *arguments): a data command with its own parser; gives the exit code."""

    def run(module, *arguments):
        parser = argparse.ArgumentParser()
        module.add_arguments(parser)
        return module.main(parser.parse_args([str(argument) for argument in arguments]))

    return run
