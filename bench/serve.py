"""`llava-jax serve` under load, and the engine without a server: the same requests in one run.

python -m bench.serve --checkpoint=FOLDER --requests=64 --rate=4

Requests arrive at random moments (a Poisson process of `--rate` a second, whatever the server
does; 0 for all at once), each with a picture of its own. They are sent to a server that is started
for it, and then answered by the engine in this process, all at once. Times are those of the client,
which shares the machine's cores with the server.

    first    seconds from sending a request to its first piece of text
    between  seconds between two pieces, of up to 8 tokens each
    goodput  requests a second whose first text came within `--first_within` seconds
"""

import base64
import concurrent.futures
import contextlib
import http.client
import io
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from absl import flags
from PIL import Image

from llava_jax import command
from llava_jax.inference.model import Llava
from llava_jax.inference.sampling import SamplingParams
from llava_jax.models.precision import DTYPES
from llava_jax.serving.command_line import keep_compilations

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Of the model, as `llava-jax serve` takes it.")
DTYPE = flags.DEFINE_enum("dtype", "float32", DTYPES, "Of computation.")
REQUESTS = flags.DEFINE_integer("requests", 64, "Number of requests.")
RATE = flags.DEFINE_float("rate", 0.0, "Requests a second; 0 sends all at once.")
TOKENS = flags.DEFINE_integer("tokens", 64, "Of each answer.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Answers at a time.")
CONTEXT = flags.DEFINE_integer("context", 1024, "Tokens of a prompt and its answer.")
FIRST_WITHIN = flags.DEFINE_float("first_within", 2.0, "Seconds, of goodput.")

WORDS = "what shape and colour has the thing in the middle of this picture".split()


@dataclass
class Record:
    """What a client saw of one request: the status, and the moment of each piece of text."""

    sent: float
    status: int = 0
    pieces: list[float] = field(default_factory=list)
    tokens: int = 0


def make_questions(count: int, side: int) -> list[tuple[str, Image.Image]]:
    """Questions of similar length, with one random picture each."""
    rng = np.random.default_rng(0)
    return [
        (
            " ".join(rng.permutation(WORDS)) + "?",
            Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)),
        )
        for _ in range(count)
    ]


def body_of(text: str, image: Image.Image, tokens: int) -> bytes:
    """The JSON of one request."""
    file = io.BytesIO()
    image.save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    body = {"messages": [{"role": "user", "content": parts}], "max_tokens": tokens}
    options = {"stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True}
    return json.dumps(body | options | {"temperature": 0}).encode()


@contextlib.contextmanager
def started(arguments: Sequence[str]) -> Iterator[int]:
    """A server process -> its port, once it is ready."""
    start = time.perf_counter()
    words = [sys.executable, "-m", "llava_jax.cli", "serve", "--port", "0", *arguments]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    try:
        for line in process.stderr:
            if found := re.search(r"ready: http://.*:(\d+)", line):
                break
        else:
            sys.exit("the server did not start")
        print(f"ready after {time.perf_counter() - start:.1f} s")
        # Its log is read, so that it never blocks.
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield int(found[1])
        process.terminate()
        process.wait()
    finally:
        process.kill()


def ask(port: int, body: bytes) -> Record:
    """Sends one request and reads its stream."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    record = Record(time.perf_counter())
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    record.status = response.status
    while line := response.readline():
        if line.startswith(b"data: {"):
            chunk = json.loads(line[6:])
            if any(choice["delta"].get("content") for choice in chunk.get("choices", ())):
                record.pieces.append(time.perf_counter())
            if chunk.get("usage"):
                record.tokens = chunk["usage"]["completion_tokens"]
    connection.close()
    return record


def send_all(port: int, bodies: Sequence[bytes], rate: float) -> list[Record]:
    """Sends each request at its moment, whatever became of those before it."""
    rng = np.random.default_rng(1)
    moments = np.cumsum(rng.exponential(1 / rate, len(bodies))) if rate else np.zeros(len(bodies))
    start = time.perf_counter()

    def at_its_moment(moment: float, body: bytes) -> Record:
        time.sleep(max(0.0, start + moment - time.perf_counter()))
        return ask(port, body)

    with concurrent.futures.ThreadPoolExecutor(len(bodies)) as pool:
        return list(pool.map(at_its_moment, moments, bodies))


def report(records: Sequence[Record], first_within: float) -> float:
    """Prints what the clients saw -> tokens of answers a second."""
    answered = [record for record in records if record.status == 200 and record.pieces]
    if not answered:
        sys.exit("no request was answered")
    seconds = max(record.pieces[-1] for record in answered) - min(r.sent for r in records)
    first = [record.pieces[0] - record.sent for record in answered]
    between = np.concatenate([np.diff(record.pieces) for record in answered])
    for name, values in (("first", first), ("between", between)):
        if not len(values):  # answers of one piece
            continue
        shown = "  ".join(f"p{p} {np.percentile(values, p):.3f}" for p in (50, 90, 99))
        print(f"{name:<10}{shown}")
    speed = sum(record.tokens for record in answered) / seconds
    good = sum(value <= first_within for value in first) / seconds
    refused = sum(record.status == 503 for record in records) / len(records)
    print(f"{'goodput':<10}{good:.2f} requests/s of {len(records) / seconds:.2f}")
    print(f"{'refused':<10}{refused:.0%} with 503")
    print(f"{'server':<10}{speed:.1f} tokens/s")
    return speed


def offline(model: Llava, questions: Sequence, tokens: int, batch_size: int) -> float:
    """Tokens of answers a second of the engine without a server."""
    params = SamplingParams(tokens, ignore_eos=True)
    model.engine.forget()
    start = time.perf_counter()
    requests = [model.request(text, [image], params) for text, image in questions]
    answers = [answer for (answer,) in model.answers(requests, batch_size)]
    return sum(len(answer.tokens) for answer in answers) / (time.perf_counter() - start)


def main() -> None:
    questions = make_questions(REQUESTS.value, 336)
    bodies = [body_of(*question, TOKENS.value) for question in questions]
    arguments = (
        "--checkpoint", CHECKPOINT.value, "--dtype", DTYPE.value,
        "--batch_size", str(BATCH_SIZE.value), "--max_model_len", str(CONTEXT.value),
        "--max_queue", str(max(128, 2 * BATCH_SIZE.value)),
    )  # fmt: skip
    with started(arguments) as port:
        ask(port, body_of(*make_questions(1, 64)[0], 4))  # nothing is new for the first request
        speed = report(send_all(port, bodies, RATE.value), FIRST_WITHIN.value)
    keep_compilations()
    model = Llava.from_pretrained(CHECKPOINT.value, dtype=DTYPE.value)
    model.engine.warm_up(BATCH_SIZE.value, CONTEXT.value, few=True)
    alone = offline(model, questions, TOKENS.value, BATCH_SIZE.value)
    print(f"{'offline':<10}{alone:.1f} tokens/s; the server reaches {speed / alone:.0%}")


if __name__ == "__main__":
    command.run(main, required=("checkpoint",))
