"""Clients that leave, do not read, send half of something, or too much: nobody else notices."""

import asyncio
import concurrent.futures
import http.client
import json
import random
import socket
import threading
import time

import pytest

from tests.serving.live_server import LiveServer, data_url, question


@pytest.fixture(scope="module")
def live(model):
    live = LiveServer(model, queue=64)
    yield live
    live.close()


def body_of(tokens: int, *images: str, **fields) -> dict:
    fields = {"max_tokens": tokens, "ignore_eos": True, "seed": 1} | fields
    return {"messages": [question("so?", *images)]} | fields


def raw_request(body: dict) -> bytes:
    data = json.dumps(body).encode()
    return (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    ).encode() + data


def connect(live) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", live.port))
    connection.settimeout(20)
    return connection


def post(live, body: dict, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", live.port, timeout=60)
    headers = {"Content-Type": "application/json"} | headers
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    return connection.getresponse()


def tasks(live) -> int:
    async def count() -> int:
        return len(asyncio.all_tasks())

    return asyncio.run_coroutine_threadsafe(count(), live.loop).result(10)


def until(condition, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_streams_go_on_while_a_large_picture_is_decoded(live, monkeypatch):
    """The picture's decoding is held up until the streams have ended."""
    reading, streamed = threading.Event(), threading.Event()
    read = live.server.pictures._read_bytes

    def slow(data: bytes, several: bool):
        reading.set()
        assert streamed.wait(60)
        return read(data, several=several)

    monkeypatch.setattr(live.server.pictures, "_read_bytes", slow)
    large = body_of(2, data_url(1, (4000, 3000), "JPEG"))
    with concurrent.futures.ThreadPoolExecutor() as pool:
        picture = pool.submit(lambda: post(live, large).read())
        assert reading.wait(60)
        for _ in range(3):
            text = post(live, body_of(40, stream=True)).read().decode()
            assert text.count("data: {") >= 5 and '"finish_reason": "length"' in text
        assert not picture.done()
        streamed.set()
        assert json.loads(picture.result())["usage"]["prompt_tokens_details"]["image_tokens"] == 4


def test_clients_that_leave_at_any_moment_leave_nothing(live, model):
    chance, before = random.Random(0), tasks(live)
    compiled = model.engine.counts.compilations

    def one(moment: float, stream: bool, n: int, large: bool) -> None:
        images = [data_url(3, (1500, 1500), "JPEG")] if large else [data_url(n)]
        data = raw_request(body_of(60, *images, stream=stream, n=n))
        with connect(live) as connection:
            connection.sendall(data[: int(len(data) * min(1.0, 4 * moment))])
            time.sleep(moment / 2)

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        for i in range(200):
            pool.submit(one, chance.random(), i % 2 == 0, 1 + i % 3, i % 20 == 0)
    live.wait_idle(60)
    until(lambda: tasks(live) <= before)
    assert live.server.guards._held == 0
    assert model.engine.counts.compilations == compiled
    assert json.loads(post(live, body_of(3)).read())["usage"]["completion_tokens"] == 3


def test_a_client_that_does_not_read_is_cut(live, caplog):
    caplog.set_level("INFO", "llava_jax")
    live.listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 14)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 12)
        connection.connect(("127.0.0.1", live.port))
        body = body_of(100, stream=True, n=8, logprobs=True, top_logprobs=20)
        connection.sendall(raw_request(body))
        until(lambda: live.server.admitted)
        until(lambda: "stopped reading" in caplog.text)
        live.wait_idle()


@pytest.mark.parametrize("served", [0, 1])
def test_half_a_request_is_closed(live, served):
    """Also behind a whole one."""
    with connect(live) as connection:
        for _ in range(served):
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answer = b""
            while not answer.endswith(b"}"):
                answer += connection.recv(1 << 16)
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: local")
        assert connection.recv(1) == b""


def test_a_body_that_does_not_arrive_is_refused(live, monkeypatch):
    monkeypatch.setattr(live.server.guards, "_seconds", 0.2)
    with connect(live) as connection:
        connection.sendall(raw_request(body_of(3))[:-5])
        answer = b""
        while not answer.endswith(b"}"):
            answer += connection.recv(1 << 16)
    assert answer.startswith(b"HTTP/1.1 408") and b'"code":"timeout"' in answer


@pytest.mark.parametrize(
    "data", [b"nonsense\r\n\r\n", b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n"]
)
def test_what_is_no_http_gets_an_error_of_the_nested_form(live, data):
    with connect(live) as connection:
        connection.sendall(data)
        head, _, body = connection.recv(1 << 16).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400")
    assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}


def test_all_bodies_together_are_bounded(live, monkeypatch):
    monkeypatch.setattr(live.server.guards, "_held", 16 * live.server.options.limits.body_bytes)
    response = post(live, body_of(3))
    assert (response.status, response.headers["Retry-After"]) == (503, "1")
    monkeypatch.undo()
    assert post(live, body_of(3)).status == 200


def test_more_text_than_any_context_holds_is_refused_before_it_is_read(live, monkeypatch):
    monkeypatch.setattr(live.server, "_jobs", None)
    for text in ("x" * 1_000_001, "é" * 1_000_001):
        response = post(live, {"messages": [question(text)]})
        assert json.loads(response.read())["error"]["code"] == "context_length_exceeded"


def test_more_answers_than_the_queue_holds_are_no_reason_to_come_back(model):
    live = LiveServer(model, queue=2)
    try:
        response = post(live, body_of(3, n=3))
        assert response.status == 400 and json.loads(response.read())["error"]["param"] == "n"
    finally:
        live.close()


def test_strict_servers_refuse_unknown_fields(model):
    live = LiveServer(model, strict=True)
    try:
        response = post(live, body_of(3, guided_json={}))
        assert response.status == 400
        assert json.loads(response.read())["error"]["param"] == "guided_json"
        assert post(live, body_of(3, user="me")).status == 200
    finally:
        live.close()


def test_responses_bear_the_name_of_their_request(live):
    names = [post(live, body_of(1), **{"X-Request-ID": name}).headers["X-Request-ID"]
             for name in ("mine-1", "not a name")]  # fmt: skip
    assert names[0] == "mine-1" and " " not in names[1] and len(names[1]) == 16


def events(response) -> list[dict]:
    lines = response.read().decode().split("\n\n")
    return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]


@pytest.mark.parametrize("stop", [[], ["e"], ["\n"]])
def test_log_probabilities_of_a_stream_are_those_of_the_whole_answer(live, stop):
    body = body_of(30, logprobs=True, top_logprobs=2, n=2, temperature=1.0, stop=stop)
    whole = json.loads(post(live, body).read())
    found = [[], []]
    for event in events(post(live, body | {"stream": True})):
        for choice in event["choices"]:
            if choice["logprobs"]:
                found[choice["index"]] += choice["logprobs"]["content"]
    assert found == [choice["logprobs"]["content"] for choice in whole["choices"]]
    total = sum(map(len, found))
    assert total == whole["usage"]["completion_tokens"] > 0


def test_prompt_log_probabilities(model):
    from llava_jax.serving.api import Limits

    live = LiveServer(model, limits=Limits(prompt_logprobs=True))
    try:
        answer = json.loads(post(live, body_of(2, prompt_logprobs=1)).read())
        (choice,) = answer["choices"]
        assert choice["prompt_logprobs"][0] is None
        assert len(choice["prompt_logprobs"]) == answer["usage"]["prompt_tokens"]
        assert all(entry["logprob"] <= 0 for entry in choice["prompt_logprobs"][1].values())
        assert post(live, body_of(2, prompt_logprobs=1, stream=True)).status == 400
    finally:
        live.close()
