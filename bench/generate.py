"""Our engine and Hugging Face generate: the same requests and weights, alternately in one run.

python -m bench.generate --checkpoint=FOLDER --dtype=float32 --batch_sizes=1,8

FOLDER is a LLaVA in Hugging Face's layout (`llava-jax export` writes one). Every request has its
own picture and an answer of 64 tokens; nothing is cached between rounds. The best round counts.
"""

import time
from collections.abc import Callable

import jax
import numpy as np
from absl import flags
from PIL import Image

from bench.huggingface import HuggingFace
from llava_jax import command
from llava_jax.inference.jobs import Request
from llava_jax.inference.model import Llava
from llava_jax.inference.prefill import cache_bucket
from llava_jax.inference.sampling import SamplingParams
from llava_jax.models.cache import PAGE
from llava_jax.models.precision import DTYPES
from llava_jax.models.quantization import FORMS

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A LLaVA folder in Hugging Face's layout.")
DTYPE = flags.DEFINE_enum("dtype", "float32", DTYPES, "Of our side.")
HF_DTYPE = flags.DEFINE_enum(
    "hf_dtype", None, ["float32", "bfloat16"], "Of transformers; default: ours."
)
QUANTIZE = flags.DEFINE_enum("quantize", None, FORMS, "Of our side: bits a weight.")
KV_CACHE = flags.DEFINE_enum("kv_cache", None, ["int8"], "Of our side: eight bits a key or value.")
BATCH_SIZES = flags.DEFINE_list("batch_sizes", ["1", "8"], "Requests at once.")
TOKENS = flags.DEFINE_integer("tokens", 64, "Of each answer.")
ROUNDS = flags.DEFINE_integer("rounds", 3, "Of each side, alternately.")

# Memory bandwidth in bytes a second, from the data sheets.
BANDWIDTH = {"H100": 3.35e12, "H200": 4.8e12, "A100": 2.04e12, "v5 lite": 0.82e12, "v6": 1.64e12}


def make_requests(model: Llava, count: int, tokens: int) -> list[Request]:
    """Requests with one random picture each and prompts of similar length."""
    rng = np.random.default_rng(0)
    params = SamplingParams(tokens, min_tokens=tokens)
    side = model.config.image.size
    pictures = [
        Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)) for _ in range(count)
    ]
    words = "what shape and colour has the thing in the middle of this picture".split()
    return [
        model.request(" ".join(rng.permutation(words)) + "?", [picture], params)
        for picture in pictures
    ]


def best_of_turns(sides: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of the best round of each side; they alternate, so that both see the same load."""
    best = dict.fromkeys(sides, float("inf"))
    for _ in range(rounds):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def measure(ours: Llava, theirs: HuggingFace, batch: int, tokens: int, rounds: int) -> None:
    """Prints a table for one batch size."""
    short, long = make_requests(ours, batch, 1), make_requests(ours, batch, tokens)

    def run_ours(requests):
        ours.engine.forget()
        return [answer.tokens for (answer,) in ours.answers(requests, batch)]

    same = np.mean(
        [a == b for a, b in zip(run_ours(long), theirs.generate(long, tokens, False), strict=True)]
    )
    run_ours(short)
    first = best_of_turns(
        {"ours": lambda: run_ours(short), "theirs": lambda: theirs.generate(short, 1, False)},
        rounds,
    )
    whole = best_of_turns(
        {"ours": lambda: run_ours(long), "theirs": lambda: theirs.generate(long, tokens, False)},
        rounds,
    )
    prompt = sum(len(request.input_ids) for request in long)
    print(f"\nbatch {batch}: {prompt} prompt tokens, {tokens} answer tokens each; "
          f"{same:.0%} of the answers are token for token the same")  # fmt: skip
    print(f"{'':<24}{'ours':>10}{'theirs':>10}{'ratio':>8}")
    decode = {name: whole[name] - first[name] for name in first}
    for label, of, amount in (
        ("prefill tokens/s", first, prompt),
        ("decode tokens/s", decode, batch * (tokens - 1)),
        ("requests/s", whole, batch),
        ("first token, ms", first, None),
    ):
        a, b = (of[n] * 1e3 if amount is None else amount / of[n] for n in ("ours", "theirs"))
        print(f"{label:<24}{a:>10.1f}{b:>10.1f}{(b / a if amount is None else a / b):>7.2f}x")
    roofline(ours, long, tokens, decode["ours"] / (tokens - 1))


def roofline(ours: Llava, requests: list[Request], tokens: int, seconds: float) -> None:
    """Prints the bytes that a decode step must read, and the share of the bandwidth it reaches."""
    decoder = ours.engine.params["decoder"]
    embedding = decoder["embed_tokens"]["embedding"]
    # Of an untied embedding table only a few rows are read.
    lookup = 0 if ours.config.decoder.tie_word_embeddings else embedding.nbytes
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(decoder)) - lookup
    longest = max(len(request.input_ids) for request in requests) + tokens // 2
    cache = bytes_a_token(ours) * len(requests) * cache_bucket(longest)
    kind = jax.devices()[0].device_kind
    speed = next((value for name, value in BANDWIDTH.items() if name in kind), None)
    share = "" if speed is None else f", {(weights + cache) / seconds / speed:.0%} of {kind}'s"
    print(f"a decode step reads {weights / 1e6:,.0f} MB of weights and {cache / 1e6:,.0f} MB of "
          f"cache: {(weights + cache) / seconds / 1e9:,.1f} GB/s{share}")  # fmt: skip


def bytes_a_token(ours: Llava) -> float:
    """Bytes of a token in the cache."""
    device = ours.engine.device
    return sum(leaf.nbytes for leaf in jax.tree.leaves(device.state.cache)) / (device.pages * PAGE)


def main() -> None:
    ours = Llava.from_pretrained(
        CHECKPOINT.value, dtype=DTYPE.value, quantize=QUANTIZE.value, kv_cache=KV_CACHE.value
    )
    dtype = HF_DTYPE.value or ours.engine.dtype
    theirs = HuggingFace(CHECKPOINT.value, dtype, ours)
    print(f"{jax.devices()[0].device_kind}: ours {DTYPE.value}, Hugging Face {dtype}")
    for batch in BATCH_SIZES.value:
        measure(ours, theirs, int(batch), TOKENS.value, ROUNDS.value)
    stats = jax.devices()[0].memory_stats()
    if stats:
        print(f"our peak memory: {stats['peak_bytes_in_use'] / 2**30:.1f} GiB")


if __name__ == "__main__":
    command.run(main, required=("checkpoint",))
