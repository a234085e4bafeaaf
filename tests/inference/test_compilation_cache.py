"""What one command compiled, the next one reads from disk."""

import json
import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import collections, json, jax
from llava_jax.serving.command_line import keep_compilations
from tests.tiny_model import random_image, tiny_llava

keep_compilations()
events = collections.Counter()
jax.monitoring.register_event_listener(lambda name, **_: events.update([name]))
tiny_llava().generate(["a?", "b"], [random_image(0), None], max_tokens=9)
names = "compile_requests_use_cache", "cache_hits"
print(json.dumps([events[f"/jax/compilation_cache/{name}"] for name in names]))
"""


def test_a_second_process_compiles_nothing(tmp_path):
    ours = ("JAX_COMPILATION_CACHE", "JAX_PERSISTENT_CACHE")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    environment |= {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}

    def run() -> tuple[int, int]:
        """How many compilations were asked for, and how many of them were read from disk."""
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return tuple(json.loads(done.stdout))

    first, hits = run()
    assert first > 3 and hits == 0
    assert run() == (first, first)
