"""What fewer bits cost: the same questions in float32 and in each cheaper form.

python -m bench.quantization --checkpoint=FOLDER --data=runs/quickstart/easy_vqa/test_1000.json

Besides accuracy it prints the share of answers that stay the same token for token; the divergence
of the distributions of their first tokens (Kullback-Leibler, in nats, over the likeliest tokens and
all others as one); and the number of tokens that long free answers share from the start.
"""

import math
from pathlib import Path

import jax
from absl import flags

from llava_jax import command
from llava_jax.evaluation import easy_vqa
from llava_jax.inference.answer import Answer, TokenLogprob
from llava_jax.inference.model import Llava
from llava_jax.inference.sampling import MAX_LOGPROBS, SamplingParams
from llava_jax.models.quantization import stored_bytes

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "What Llava.from_pretrained takes.")
DATA = flags.DEFINE_string("data", None, "Records of easy-VQA, written by the quickstart.")
LIMIT = flags.DEFINE_integer("limit", 1000, "Number of questions.")
FREE = flags.DEFINE_integer("free", 64, "Number of pictures for long answers.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Requests at once.")

FORMS = {
    "float32": {},
    "weights int8": {"quantize": "int8"},
    "weights int4": {"quantize": "int4"},
    "KV cache int8": {"kv_cache": "int8"},
    "both int8": {"quantize": "int8", "kv_cache": "int8"},
    "mixed": {"dtype": "mixed"},
    "mixed, both int8": {"dtype": "mixed", "quantize": "int8", "kv_cache": "int8"},
    "bfloat16": {"dtype": "bfloat16"},
}
FREE_TOKENS = 64


def main() -> None:
    data = Path(DATA.value)
    questions = easy_vqa.load(data.parent, data.stem).questions[: LIMIT.value]
    print("| | decoder's weights, MB | accuracy | same answers | KL, mean | KL, largest | "
          "same tokens of 64 |\n|---|--:|--:|--:|--:|--:|--:|")  # fmt: skip
    exact = None
    for name, form in FORMS.items():
        model = Llava.from_pretrained(CHECKPOINT.value, **form)
        short, free = ask(model, questions)
        exact = exact or (short, free)
        right = [easy_vqa.grade(q, a.text) for q, a in zip(questions, short, strict=True)]
        same = [a.tokens == b.tokens for a, b in zip(exact[0], short, strict=True)]
        apart = [
            divergence(a.logprobs[0], b.logprobs[0]) for a, b in zip(exact[0], short, strict=True)
        ]
        alike = [common_start(a.tokens, b.tokens) for a, b in zip(exact[1], free, strict=True)]
        decoder = model.engine.params["decoder"]
        leaves = jax.tree.leaves(decoder)
        size = sum(stored_bytes(leaf.shape, leaf.dtype) for leaf in leaves) / 1e6
        cells = (f"{size:.0f}", f"{100 * mean(right):.1f}", f"{100 * mean(same):.1f}%",
                 f"{mean(apart):.1e}", f"{max(apart):.1e}", f"{mean(alike):.1f}")  # fmt: skip
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def ask(model: Llava, questions) -> tuple[list[Answer], list[Answer]]:
    """Short answers to all questions, and long ones about the first pictures."""
    short = SamplingParams(8, logprobs=MAX_LOGPROBS, min_tokens=1)
    free = SamplingParams(FREE_TOKENS, ignore_eos=True)
    pictures = list(dict.fromkeys(q.images for q in questions))[: FREE.value]
    requests = [model.request(q.prompt, q.images, short) for q in questions]
    requests += [model.request("Tell a story about this picture.", p, free) for p in pictures]
    answers = [answer for (answer,) in model.answers(requests, BATCH_SIZE.value)]
    return answers[: len(questions)], answers[len(questions) :]


def divergence(p: TokenLogprob, q: TokenLogprob) -> float:
    """A lower bound of KL(p || q): over the tokens that both report, and all others as one."""
    both = p.top.keys() & q.top.keys()
    pairs = [(math.exp(p.top[token]), math.exp(q.top[token])) for token in both]
    pairs.append(tuple(max(1 - sum(side), 1e-9) for side in zip(*pairs, strict=True)))
    return max(sum(a * math.log(a / b) for a, b in pairs if a and b), 0.0)


def common_start(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


if __name__ == "__main__":
    command.run(main, required=("checkpoint", "data"))
