"""What prompt look-up gains: the same requests with and without guesses, in one run.

python -m bench.lookup --checkpoint=runs/quickstart/align --template=chatml --dtype=float32

Three kinds of requests. Captions say what is in no prompt. Transcripts repeat text of the prompt,
as answers do that are asked with what an OCR program has read, in the words of LLaVA-1.5's TextVQA.
Chats ask for an earlier answer again, changed a little.

Nothing is cached between rounds. The sides alternate, and the least of the rounds counts: seconds
of CPU, or of the clock where an accelerator computes. What is read before the first token is the
same on all sides, and left out.
"""

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np
from absl import flags
from PIL import Image

from bench.contrast import CHECKPOINT, DTYPE, REQUESTS, ROUNDS, TOKENS
from llava_jax import command
from llava_jax.inference.engine import Engine
from llava_jax.inference.jobs import Request
from llava_jax.inference.model import Llava
from llava_jax.inference.sampling import SamplingParams

TEMPLATE = flags.DEFINE_string("template", None, "Of conversations; default: the checkpoint's.")
GUESSES = flags.DEFINE_list("guesses", ["2", "4", "8"], "At a time.")
TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 takes the likeliest token each time.")

KINDS = ("caption", "transcript", "chat")
SIGNS = [
    "NOTICE Visitors must report to the front office before entering the building",
    "CENTRAL STATION Platform 4 Express service to Riverside departs at 10:45 and 16:20",
    "FRESH MARKET Apples 2.49 Bananas 0.79 Tomatoes 3.15 Organic eggs 4.99 Total 11.42",
    "WARNING High voltage Authorized personnel only Call 555-0142 in an emergency",
    "CITY LIBRARY Open Monday to Friday 9 am to 8 pm Saturday 10 am to 5 pm Closed on Sunday",
    "Harvest Festival Saturday October 12 Live music Local food Free parking at North Field",
    "CAUTION Wet floor Please use the other entrance on Garden Street until 3 pm",
    "Dr. Helen Ramirez Family Medicine Suite 210 Hours by appointment Phone 555-0199",
]
SAID = [
    "The harbor is full of small fishing boats. A man in a yellow coat repairs a net on the pier, "
    "and two gulls wait for what he throws away. Behind them the white houses climb the hill.",
    "A young woman rides a red bicycle along the canal. She carries a basket of bread and flowers, "
    "and a brown dog runs next to the wheel. The trees on the other side have lost their leaves.",
    "Three children build a castle of sand near the water. The smallest one brings a bucket, the "
    "others dig a deep moat around the towers. A striped umbrella gives shade to their parents.",
    "The kitchen has a long wooden table with six chairs. Copper pans hang above the stove, and a "
    "gray cat sleeps on the window sill. Somebody has left a bowl of lemons next to the sink.",
]


def make_requests(model: Llava, kind: str, params: SamplingParams) -> list[Request]:
    """Eight requests of one of KINDS, each with a random picture."""
    rng, side = np.random.default_rng(0), model.config.image.size
    requests = []
    for i, sign in enumerate(SIGNS):
        picture, history = Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)), ()
        if kind == "caption":
            question = f"Describe this picture in {i + 3} sentences."
        elif kind == "transcript":
            question = (
                "What is written on the sign in this picture?\n"
                f"Reference OCR token: {sign}\nWrite out the whole text."
            )
        else:
            said = SAID[i % len(SAID)]
            history = [("<image>\nDescribe this picture.", said)]
            question = f"Write the same description again, but begin it with 'Picture {i + 1}:'"
        requests.append(model.request(question, picture, params, history))
    return requests


@dataclasses.dataclass
class Side:
    """The same requests with so many guesses at a time.

    Attributes:
      first, whole: least seconds until the first tokens, and until the last.
      tokens: of each answer.
      counts: what the engine counted in a round.
    """

    engine: Engine
    first: float = math.inf
    whole: float = math.inf
    tokens: list[list[int]] = dataclasses.field(default_factory=list)
    counts: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def decoded(self) -> int:
        """Tokens that were not chosen by reading a prompt."""
        return self.counts["answer_tokens"] - self.counts["requests"]

    @property
    def speed(self) -> float:
        """Tokens a second."""
        return self.decoded / (self.whole - self.first)

    @property
    def tokens_a_pass(self) -> float:
        return self.decoded / (self.decoded - self.counts["accepted_tokens"])


def run(
    model: Llava, side: Side, requests: list[Request], batch: int, clock: Callable[[], float]
) -> float:
    """Seconds that a side takes for requests, of which nothing is known yet."""
    model.engine = side.engine
    side.engine.forget()
    before, began = side.engine.counts, clock()
    answers = model.answers(requests, batch)
    seconds, after = clock() - began, vars(side.engine.counts)
    side.tokens = [answer.tokens for (answer,) in answers]
    side.counts = {name: value - getattr(before, name) for name, value in after.items()}
    return seconds


def measure(
    model: Llava, sides: Sequence[Side], kind: str, batch: int, params: SamplingParams, rounds: int
) -> None:
    """Fills in the sides, after a round that compiles."""
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    long = make_requests(model, kind, params)
    short = make_requests(model, kind, dataclasses.replace(params, max_tokens=1))
    for number in range(rounds + 1):
        for side in sides:
            first = run(model, side, short, batch, clock)
            whole = run(model, side, long, batch, clock)
            if number:
                side.first, side.whole = min(side.first, first), min(side.whole, whole)


def main() -> None:
    model = Llava.from_pretrained(CHECKPOINT.value, dtype=DTYPE.value, template=TEMPLATE.value)
    params = model.engine.params
    engines = {
        count: Engine(model.config, params, model.dtype, lookup=count)
        for count in map(int, GUESSES.value)
    }
    engines = {0: model.engine} | engines
    seconds = "of CPU" if jax.default_backend() == "cpu" else "on the clock"
    print(f"{jax.devices()[0].device_kind}, {model.engine.dtype}, temperature {TEMPERATURE.value}")
    print(f"| prompts | at once | guesses | tokens | tokens a second {seconds} | ratio | "
          "tokens a pass | guesses that came true | same answers |\n"
          "|---|--:|--:|--:|--:|--:|--:|--:|--:|")  # fmt: skip
    settings = SamplingParams(int(TOKENS.value[-1]), temperature=TEMPERATURE.value)
    for kind, batch in itertools.product(KINDS, map(int, REQUESTS.value)):
        sides = {count: Side(engine) for count, engine in engines.items()}
        measure(model, list(sides.values()), kind, batch, settings, ROUNDS.value)
        plain = sides[0]
        for count, side in sides.items():
            true = side.counts["accepted_tokens"] / max(side.counts["draft_tokens"], 1)
            same = sum(a == b for a, b in zip(plain.tokens, side.tokens, strict=True))
            print(f"| {kind} | {batch} | {count} | {side.decoded} | {side.speed:.1f} | "
                  f"{side.speed / plain.speed:.2f} | {side.tokens_a_pass:.2f} | {true:.0%} | "
                  f"{same} of {len(side.tokens)} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    command.run(main, required=("checkpoint",))
