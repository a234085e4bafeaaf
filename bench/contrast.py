"""What contrast costs: the same requests plain and decoded against a worse picture, in one run.

python -m bench.contrast --checkpoint=runs/quickstart/instruct --requests=1,8

Every request has its own picture, and nothing is cached between rounds. The sides alternate, and
the least of the rounds counts: seconds of CPU, or of the clock where an accelerator computes.
"""

import time

import jax
import numpy as np
from absl import flags
from PIL import Image

from llava_jax import command
from llava_jax.inference.jobs import Request
from llava_jax.inference.model import Llava
from llava_jax.inference.sampling import CONTRASTS, SamplingParams
from llava_jax.models.precision import DTYPES

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A run of train.py or a LLaVA folder.")
DTYPE = flags.DEFINE_enum("dtype", "auto", DTYPES, "Of computation.")
REQUESTS = flags.DEFINE_list("requests", ["1", "8"], "Requests at once; with contrast twice as "
                             "many rows.")  # fmt: skip
TOKENS = flags.DEFINE_list("tokens", ["1", "64"], "Of each answer.")
ROUNDS = flags.DEFINE_integer("rounds", 3, "Of each side, alternately.")


def make_requests(
    model: Llava, count: int, tokens: int, contrast: str | None = None
) -> list[Request]:
    """Requests with one random picture each."""
    rng, side = np.random.default_rng(0), model.config.image.size
    params = SamplingParams(tokens, min_tokens=tokens, contrast=contrast)
    pictures = rng.integers(0, 256, (count, side, side, 3), np.uint8)
    question = "what shape and colour has the thing in the middle of this picture?"
    return [model.request(question, Image.fromarray(picture), params) for picture in pictures]


def least_seconds(model: Llava, sides: dict[str | None, list[Request]], rounds: int) -> dict:
    """Seconds of the quickest round of each side, after one that compiles."""
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    least = dict.fromkeys(sides, float("inf"))
    for number in range(rounds + 1):
        for name, requests in sides.items():
            model.engine.forget()
            began = clock()
            model.answers(requests, 2 * len(requests))
            if number:
                least[name] = min(least[name], clock() - began)
    return least


def main() -> None:
    model = Llava.from_pretrained(CHECKPOINT.value, dtype=DTYPE.value)
    print(f"{jax.devices()[0].device_kind}, {model.dtype}: seconds, and times the plain ones")
    print(f"{'':<24}{'plain':>8}" + "".join(f"{kind:>16}" for kind in CONTRASTS))
    for count in map(int, REQUESTS.value):
        for tokens in map(int, TOKENS.value):
            sides = {kind: make_requests(model, count, tokens, kind) for kind in (None, *CONTRASTS)}
            least = least_seconds(model, sides, ROUNDS.value)
            plain = least.pop(None)
            cells = (f"{value:>9.2f} {value / plain:>5.2f}x" for value in least.values())
            print(f"{f'{count} of {tokens} tokens':<24}{plain:>8.2f}" + "".join(cells))


if __name__ == "__main__":
    command.run(main, required=("checkpoint",))
