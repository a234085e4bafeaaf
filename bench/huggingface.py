"""Requests through transformers' generate: the other side of the inference benchmarks."""

import os

import numpy as np
import torch
import transformers

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
        images = [picture.load() for request in requests for picture in request.pictures]
        if images:
            inputs["pixel_values"] = self._pixels(np.concatenate(images))
        ends = self._ours._stop_ids()
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
