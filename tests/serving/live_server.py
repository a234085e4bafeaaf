"""A server of a tiny model on a free port of this machine, in a thread of the test process."""

import asyncio
import base64
import contextlib
import io
import socket
import threading
import time

import uvicorn

from llava_jax.models.llava import LlavaConfig
from llava_jax.serving.app import Options, Server
from llava_jax.serving.connections import http_protocol
from tests.tiny_model import CONFIG, random_image, tiny_llava

CONTEXT = 128


class LiveServer:
    """Attributes: server, model, url (of its root), loop."""

    def __init__(self, model, rows: int = 4, **options):
        self.model = model
        self.server = Server(Options(names=("tiny", "org/tiny"), **options), "0.test")
        self.server.attach(model, CONTEXT, rows, url_hosts=None)
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.port = self.listening.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.loop = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        while self.server.worker is None:
            time.sleep(0.01)

    def _run(self) -> None:
        async def run():
            self.loop = asyncio.get_running_loop()
            config = uvicorn.Config(
                self.server, log_config=None, lifespan="off", http=http_protocol(2.0, 3.0)
            )
            self.uvicorn = uvicorn.Server(config)
            self.uvicorn.capture_signals = contextlib.nullcontext
            self.server.start(self.loop)
            await self.uvicorn.serve(sockets=[self.listening])

        asyncio.run(run())

    def wait_idle(self, seconds: float = 20) -> None:
        """Returns once no request is held by anything."""
        end = time.monotonic() + seconds
        while self.server.admitted or self.server.worker.live:
            assert time.monotonic() < end, "something is still held"
            time.sleep(0.02)

    def close(self) -> None:
        self.server.worker.close()
        self.uvicorn.should_exit = True
        self._thread.join(20)


def warm_model(rows: int = 4, config: LlavaConfig = CONFIG):
    model = tiny_llava(config)
    model.engine.warm_up(rows, CONTEXT, few=True, traces=True)
    return model


def data_url(seed: int = 0, size=(11, 9), kind: str = "PNG") -> str:
    file = io.BytesIO()
    random_image(seed, size).save(file, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def question(text: str, *images: str) -> dict:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}
