"""`llava-jax serve` as a command: what it refuses at the start, and how its process ends."""

import argparse
import dataclasses
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from llava_jax.cli import main
from llava_jax.errors import LlavaError
from llava_jax.inference.model import Llava
from llava_jax.models.anyres import Tiling
from llava_jax.models.images import ImageSpec
from llava_jax.models.video import VideoSpec
from llava_jax.serving import command_line, serve
from tests.serving.live_server import question
from tests.tiny_model import VISION, config_with, tiny_llava

ROOT = Path(__file__).parents[2]
# The command with a tiny model, whose calls of the decoder are slow, or fail if a file says so.
SCRIPT = """
import sys, time
from pathlib import Path
from llava_jax.cli import main
from llava_jax.inference.device import Device
from llava_jax.inference.model import Llava
from tests.tiny_model import tiny_llava

folder, real = Path(sys.argv[1]), Device.decode

def decode(*arguments):
    time.sleep(0.2)
    if (folder / "broken").exists():
        raise RuntimeError("a step failed")
    return real(*arguments)

Device.decode = decode
Llava.from_pretrained = lambda *_, **__: tiny_llava()
raise SystemExit(main(["serve", "--checkpoint", str(folder), "--port", "0", *sys.argv[2:]]))
"""


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    return parser.parse_args(["--checkpoint", "x", *words])


def test_a_port_that_is_taken_is_one_sentence(capsys, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", "--checkpoint", str(tmp_path), "--port", port]) == 1
    message = capsys.readouterr().err
    assert f"--port {port}" in message and "in use" in message and "Traceback" not in message


@pytest.mark.parametrize("words", [("--port", "70000"), ("--host", "no.such.name.invalid")])
def test_an_address_that_does_not_exist(words, capsys, tmp_path):
    assert main(["serve", "--checkpoint", str(tmp_path), "--port", "0", *words]) == 1
    assert words[1] in capsys.readouterr().err


def test_a_checkpoint_that_is_not_there(capsys):
    assert main(["serve", "--checkpoint", "/no/such/folder", "--port", "0"]) == 1
    assert "no checkpoint folder at /no/such/folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, message",
    [
        (("--batch_size", "0"), "--batch_size"),
        (("--max_queue", "0"), "--max_queue"),
        (("--max_images", "-1"), "--max_images"),
        (("--max_tokens", "0"), "--max_tokens"),
        (("--temperature", "-1"), "temperature"),
        (("--lookup", "-1"), "lookup must be a whole number"),
        (("--cache_tokens", "8"), "cache_tokens must be a whole number from 16"),
        (("--api_key_file", "/no/such/file"), "--api_key_file /no/such/file cannot be read"),
    ],
)
def test_flags_out_of_range(words, message):
    with pytest.raises(LlavaError, match=re.escape(message)):
        serve.make_server(arguments(*words))


@pytest.mark.parametrize("content, words", [(b"  \n", "holds no key"), (b"\xff\xfe", "not text")])
def test_a_key_file_without_keys(content, words, tmp_path):
    (tmp_path / "keys").write_bytes(content)
    with pytest.raises(LlavaError, match=words):
        serve.make_server(arguments("--api_key_file", str(tmp_path / "keys")))


def test_keys_come_from_the_file_and_the_environment(tmp_path, monkeypatch):
    (tmp_path / "keys").write_text("one\ntwo\n")
    monkeypatch.setenv("LLAVA_API_KEY", "three")
    server = serve.make_server(arguments("--api_key_file", str(tmp_path / "keys")))
    assert sorted(server.options.keys) == ["one", "three", "two"]


@pytest.mark.parametrize("length", ["15", "513", "-4"])
def test_a_context_that_the_model_does_not_have(length, tmp_path, monkeypatch):
    monkeypatch.setattr(Llava, "from_pretrained", lambda *_, **__: tiny_llava())
    monkeypatch.setattr(command_line, "keep_compilations", lambda: None)
    args = arguments("--max_model_len", length)
    args.checkpoint = str(tmp_path)
    with pytest.raises(LlavaError, match="from 16 to 512"):
        serve.load(args, serve.make_server(args))


def test_the_default_context_has_room_for_the_largest_picture():
    side = lambda grids: tuple((c, r) for c in range(1, grids + 1) for r in range(1, grids + 1))
    make = lambda length, image: dataclasses.replace(
        config_with(max_position_embeddings=length),
        vision=dataclasses.replace(VISION, patch_size=14),
        image=image,
    )
    clip, siglip = make(4096, ImageSpec(336)), make(32768, ImageSpec(384))
    next_, onevision = (
        dataclasses.replace(config, image=ImageSpec(config.image.size, "anyres", tiling=tiling))
        for config, tiling in ((clip, Tiling()), (siglip, Tiling(side(6), cap=9)))
    )
    contexts = [serve.default_context(c) for c in (clip, siglip, next_, onevision)]
    assert contexts == [2048, 2048, 4096, 12288]
    assert serve.default_context(make(1024, ImageSpec(336))) == 1024
    assert serve.describe_pictures(clip, 2048) == "a picture takes 576 tokens: at most 3 fit"
    whole, part = (serve.describe_pictures(onevision, context) for context in (12288, 8192))
    assert whole == "a picture takes from 729 to 8,829 tokens, by its size: the largest fits"
    assert part.endswith("larger ones are refused: --max_model_len")
    one_view = dataclasses.replace(clip, image=ImageSpec(336, "pad", video=VideoSpec()))
    assert serve.describe_pictures(one_view, 2048) == "a picture takes 576 tokens: at most 3 fit"
    pooled = VideoSpec("square", "average_before_projector", "no_token")
    pooled = dataclasses.replace(next_, image=dataclasses.replace(next_.image, video=pooled))
    assert serve.describe_pictures(pooled, 4096).startswith("a picture takes from 576 to 2,928 tok")


class Process:
    """The command in a process of its own; see SCRIPT."""

    def __init__(self, folder: Path, *words: str):
        environment = os.environ | {"XDG_CACHE_HOME": str(folder.parent), "JAX_PLATFORMS": "cpu"}
        small = ("--batch_size", "2", "--max_model_len", "64")
        self.process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(folder), *small, *words],
            cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.log, self._ready = [], threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self._ready.wait(500) and self.process.poll() is None, self.log

    def _read(self) -> None:
        for line in self.process.stderr:
            self.log.append(line)
            if found := re.search(r"ready: http://127.0.0.1:(\d+)", line):
                self.port = int(found[1])
                self._ready.set()
        self._ready.set()

    def request(self, method: str, path: str, body: dict | None = None):
        """The response to a request; its body is read by the caller."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        head = {"Content-Type": "application/json"}
        connection.request(method, path, json.dumps(body) if body else None, head)
        return connection.getresponse()

    def stream(self, tokens: int):
        body = {"messages": [question("long?")], "max_tokens": tokens, "stream": True}
        return self.request("POST", "/v1/chat/completions", body | {"ignore_eos": True})

    def signal(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def status(self, path: str) -> int:
        return self.request("GET", path).status

    def end(self) -> int:
        try:
            return self.process.wait(60)
        finally:
            self.process.kill()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint's folder; compiled programs are kept next to it."""
    folder = tmp_path_factory.mktemp("cache") / "model"
    folder.mkdir()
    return folder


def until(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.slow
def test_sigterm_drains(folder):
    process = Process(folder)
    try:
        running = process.stream(32)
        running.readline()
        process.signal()
        until(lambda: process.status("/ready") == 503)
        refused = process.stream(4)
        assert (refused.status, refused.headers["Retry-After"]) == (503, "5")
        text = running.read().decode()
        assert '"finish_reason": "length"' in text and text.endswith("data: [DONE]\n\n")
    finally:
        code = process.end()
    assert code == 0, process.log
    assert not any("long?" in line for line in process.log)  # prompts are not logged


@pytest.mark.slow
def test_a_second_sigterm_ends_streams_with_an_error(folder):
    process = Process(folder)
    try:
        running = process.stream(40)
        running.readline()
        process.signal()
        until(lambda: process.status("/ready") == 503)
        process.signal()
        text = running.read().decode()
        assert "shutting down" in text and '"finish_reason": "length"' not in text
    finally:
        code = process.end()
    assert code == 1, process.log


@pytest.mark.slow
def test_three_faults_in_a_row_end_the_process(folder):
    process = Process(folder)
    try:
        (folder / "broken").touch()
        for _ in range(3):
            assert process.stream(9).read()  # a stream that ends with an error, or a status
    finally:
        (folder / "broken").unlink()
        code = process.end()
    assert code == 1, process.log


@pytest.mark.slow
def test_the_start_reports_its_progress_and_can_be_ended(folder):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    script = SCRIPT.replace("tiny_llava()\n", "time.sleep(100)\n")
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(folder), "--port", str(port)], cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"}, stderr=subprocess.DEVNULL,
    )  # fmt: skip

    def answer(path: str) -> tuple[int, dict]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        except ConnectionError:
            return 0, {}

    try:
        until(lambda: answer("/health") == (200, {"status": "ok"}), 100)
        assert answer("/ready") == (503, {"status": "loading the model"})
        assert answer("/v1/models")[0] == 503
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    finally:
        process.kill()
