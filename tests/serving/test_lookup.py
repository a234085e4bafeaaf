"""Prompt look-up in a server: the answers of one without it, and its counts among the metrics."""

import json
import re
import urllib.request

from llava_jax.inference.model import Llava
from tests.inference.test_lookup import params_that_repeat
from tests.serving.live_server import LiveServer, question
from tests.tiny_model import CONFIG, byte_tokenizer


def test_answers_and_metrics():
    plain, guessing = (
        Llava(CONFIG, params_that_repeat(), byte_tokenizer(), "chatml", lookup=count)
        for count in (0, 3)
    )
    server = LiveServer(guessing)
    try:
        body = {"messages": [question("abab?")], "max_tokens": 30, "ignore_eos": True}
        request = urllib.request.Request(
            f"{server.url}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        answer = json.loads(urllib.request.urlopen(request).read())
        text = urllib.request.urlopen(f"{server.url}/metrics").read().decode()
        server.wait_idle()
    finally:
        server.close()
    found = answer["choices"][0]["message"]["content"]
    assert found == plain.generate("abab?", max_tokens=30, ignore_eos=True)
    counts = guessing.engine.counts
    for name, count in (
        ("drafts", counts.drafts),
        ("draft_tokens", counts.draft_tokens),
        ("accepted_tokens", counts.accepted_tokens),
    ):
        (value,) = re.findall(rf"^vllm:spec_decode_num_{name}_total{{.*}} (.*)$", text, re.M)
        assert float(value) == count > 0
