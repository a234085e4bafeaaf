"""Requests through transformers' generate: the other side of the inference benchmarks."""

import os
import time
from collections.abc import Sequence

import numpy as np
import torch
import transformers

from llava_jax.data.media import inspect_image
from llava_jax.inference.jobs import Request
from llava_jax.inference.model import Llava

# JAX reads this when it first looks for devices; without it, it takes most of the shared card.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


class HuggingFace:
    """A LLaVA folder in transformers that reads the same token ids and pixels as our engine.

    Our code decodes and resizes the pictures for both sides, and the time counts for both.
    """

    def __init__(self, folder: str, dtype: str, ours: Llava):
        kind = transformers.AutoModelForImageTextToText
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = kind.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
        self.model.to(self.device)
        self._ours, self._dtype = ours, getattr(torch, dtype)
        self._image_id = self.model.config.image_token_id

    def generate(self, requests: list[Request], max_tokens: int, until_end: bool) -> list[list]:
        """Greedy tokens of a batch padded on the left; exactly `max_tokens` unless `until_end`."""
        longest = max(len(request.input_ids) for request in requests)
        ids = np.zeros((len(requests), longest), np.int64)
        mask = np.zeros_like(ids)
        for row, request in enumerate(requests):
            place = np.s_[row, longest - len(request.input_ids) :]
            ours = request.input_ids
            ids[place] = np.where(ours == self._ours.config.image_token_id, self._image_id, ours)
            mask[place] = 1
        inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
        pictures = [picture for request in requests for picture in request.pictures]
        if pictures:
            tiles = [self._pixels(picture.load()) for picture in pictures]
            inputs["pixel_values"] = torch.cat(tiles)
        if pictures and self._ours.config.image.by_size:
            # Padded, with the sizes that say how many are real. A picture's key begins with a file.
            sizes = [inspect_image(str(picture.key[0]))[::-1] for picture in pictures]
            inputs["pixel_values"] = torch.nn.utils.rnn.pad_sequence(tiles, batch_first=True)
            inputs["image_sizes"] = torch.tensor(sizes)
            counts = [len(request.pictures) for request in requests]
            inputs["batch_num_images"] = torch.tensor(counts)
        ends = list(self._ours.jobs(requests[0])[0].stops)
        lengths = {"eos_token_id": ends} if until_end else {"min_new_tokens": max_tokens}
        with torch.inference_mode():
            tokens = self.model.generate(
                **{name: value.to(self.device) for name, value in inputs.items()},
                max_new_tokens=max_tokens,
                do_sample=False,
                pad_token_id=0,
                **lengths,
            )
        return [self._cut(row, ends if until_end else ()) for row in tokens[:, longest:].tolist()]

    def _pixels(self, images: np.ndarray) -> torch.Tensor:
        config = self._ours.config
        pixels = (images / 255 - config.image.mean) / config.image.std
        return torch.tensor(pixels.transpose(0, 3, 1, 2)).to(self._dtype)

    def _cut(self, tokens: list[int], ends) -> list[int]:
        place = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
        return tokens[:place]


def compare(
    ours: Llava,
    theirs: HuggingFace,
    requests: Sequence[Request],
    batch_size: int,
    hf_batch_sizes: Sequence[int],
    tokens: int,
    rounds: int,
) -> None:
    """Prints the questions a second of both sides: of wall time, and of CPU time of all threads.

    Args:
      tokens: the most of an answer.
      rounds: of each side, alternately; the best counts.
    """

    def run_ours(count):
        ours.engine.forget()
        return [a.tokens for (a,) in ours.answers(requests[:count], batch_size)]

    def run_theirs(batch, count):
        answers = []
        for start in range(0, count, batch):
            batch_of = requests[start : min(start + batch, count)]
            answers += theirs.generate(batch_of, tokens, True)
        return answers

    sides = {"ours": run_ours} | {
        f"Hugging Face, batch {size}": lambda count, size=size: run_theirs(size, count)
        for size in hf_batch_sizes
    }
    best, work, outputs = dict.fromkeys(sides, float("inf")), dict.fromkeys(sides, float("inf")), {}
    for name, run in sides.items():  # compiles
        run(len(requests) if name == "ours" else min(64, len(requests)))
    for _ in range(rounds):
        for name, run in sides.items():
            start, of_cpu = time.perf_counter(), time.process_time()
            outputs[name] = run(len(requests))
            best[name] = min(best[name], time.perf_counter() - start)
            work[name] = min(work[name], time.process_time() - of_cpu)
    for name, seconds in best.items():
        print(f"{name:<24}{len(requests) / seconds:>8.2f} questions/s, "
              f"{work[name] / len(requests):.2f} s of CPU a question")  # fmt: skip
    rivals = [name for name in sides if name != "ours"]
    rival, saver = min(rivals, key=best.get), min(rivals, key=work.get)
    same = sum(a == b for a, b in zip(outputs["ours"], outputs[rival], strict=True))
    c = ours.engine.counts
    print(f"ratio to the best of transformers: {best[rival] / best['ours']:.2f}x, of CPU time "
          f"{work[saver] / work['ours']:.2f}x; {same} of {len(requests)} answers token for token "
          f"the same; {c.shared_tokens / c.prompt_tokens:.0%} of prompt tokens shared")  # fmt: skip
