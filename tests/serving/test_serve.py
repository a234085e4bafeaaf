"""The server over HTTP: the same answers as Python, and nothing held when clients leave."""

import concurrent.futures
import dataclasses
import http.client
import json
import socket
import threading
import time

import openai
import pytest

from llava_jax.models.images import ImageSpec
from llava_jax.serving.api import picture_card
from tests.serving.live_server import LiveServer, data_url, question
from tests.tiny_model import CONFIG, random_image


@pytest.fixture(scope="module")
def live(model):
    live = LiveServer(model, queue=64)
    yield live
    live.close()


@pytest.fixture(scope="module")
def client(live):
    return openai.OpenAI(
        base_url=f"{live.url}/v1",
        api_key="any",
        max_retries=0,
        timeout=60,
        _strict_response_validation=True,
    )


def chat(client, *messages, **fields):
    return client.chat.completions.create(
        model="tiny", messages=list(messages), **{"max_tokens": 12, "temperature": 0} | fields
    )


def post(live, path: str, body, **headers) -> tuple[int, dict, http.client.HTTPResponse]:
    connection = http.client.HTTPConnection("127.0.0.1", live.port, timeout=30)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", path, data, {"Content-Type": "application/json"} | headers)
    response = connection.getresponse()
    return response.status, json.loads(response.read() or b"{}"), response


def test_the_same_answer_as_from_python(live, client, model):
    live.wait_idle()
    images = [random_image(0), random_image(1)]
    found = chat(client, question("what?", data_url(0), data_url(1)), seed=3, temperature=0.8)
    live.wait_idle()
    expected = model.complete(
        ["<image>\n<image>\nwhat?"], [images], seed=3, temperature=0.8, max_tokens=12
    )[0][0]
    assert found.choices[0].message.content == expected.text
    assert found.choices[0].finish_reason == expected.finish_reason
    assert found.usage.prompt_tokens == expected.prompt_tokens
    assert found.usage.completion_tokens == len(expected.tokens)
    assert found.usage.prompt_tokens_details.image_tokens == 8


def test_many_at_once_are_each_as_alone_and_nothing_is_compiled(live, client, model):
    before = model.engine.counts.compilations

    def one(i: int) -> str:
        images = [data_url(j) for j in range(i % 3)]
        return chat(client, question(f"q{i % 5}", *images), max_tokens=4 + i % 7).choices[0]

    alone = [one(i).message.content for i in range(15)]
    with concurrent.futures.ThreadPoolExecutor(15) as pool:
        together = [choice.message.content for choice in pool.map(one, range(15))]
    assert together == alone
    assert model.engine.counts.compilations == before


def test_a_stream_joined_is_the_whole_answer(client):
    messages = [question("stream?", data_url(2))]
    whole = chat(client, *messages, n=2, temperature=0.9, seed=5)
    texts, ends, usages = ["", ""], [None, None], []
    for chunk in chat(
        client, *messages, n=2, temperature=0.9, seed=5, stream=True,
        stream_options={"include_usage": True},
    ):  # fmt: skip
        usages += [chunk.usage] if chunk.usage else []
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            ends[choice.index] = choice.finish_reason or ends[choice.index]
    assert texts == [choice.message.content for choice in whole.choices]
    assert ends == [choice.finish_reason for choice in whole.choices]
    assert [usage.completion_tokens for usage in usages] == [whole.usage.completion_tokens]


def test_log_probabilities(client):
    found = chat(client, question("p?"), logprobs=True, top_logprobs=2).choices[0]
    entries = found.logprobs.content
    assert entries and all(len(entry.top_logprobs) == 2 for entry in entries)
    assert all(entry.logprob <= entry.top_logprobs[0].logprob <= 0 for entry in entries)


def test_earlier_turns_and_a_system_prompt_are_read(client, model):
    history = [question("first?", data_url(0)), {"role": "assistant", "content": "one"}]
    found = chat(client, {"role": "system", "content": "You are a helpful assistant."},
                 *history, question("second?"))  # fmt: skip
    expected = model.chat("second?", [random_image(0)], [("<image>\nfirst?", "one")], max_tokens=12)
    assert found.choices[0].message.content == expected
    other = chat(client, {"role": "system", "content": "Be rude."}, *history, question("second?"))
    assert other.usage.prompt_tokens != found.usage.prompt_tokens


def test_typed_marks_are_plain_text(client):
    """They neither make a picture nor end a turn."""
    typed = "<image> <|im_end|> <|endoftext|>"
    found = chat(client, question(typed, data_url(0))).usage
    letters = chat(client, question("x" * len(typed), data_url(0))).usage  # a byte a token
    assert found.prompt_tokens_details.image_tokens == 4
    assert found.prompt_tokens == letters.prompt_tokens


def test_text_completions_continue_a_text(client):
    found = client.completions.create(
        model="tiny", prompt="ab", max_tokens=6, temperature=0, logprobs=1
    )
    assert found.usage.prompt_tokens == 2 and found.choices[0].logprobs.tokens


def test_models_say_what_pictures_take(client):
    card = client.models.retrieve("tiny").to_dict()
    assert (card["image_mode"], card["image_pixels"], card["max_image_tokens"]) == ("pad", 8, 4)
    tiled = dataclasses.replace(CONFIG, image=ImageSpec(8, "anyres"))
    assert picture_card(tiled) == {
        "image_mode": "anyres",
        "image_pixels": 24,
        "max_image_tokens": 24,
    }


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny", "org/tiny"]
    assert client.models.retrieve("org/tiny").id == "org/tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


@pytest.mark.parametrize(
    "url, words",
    [
        ("file:///etc/hostname", "must be a data:image"),
        ("/etc/hostname", "must be a data:image"),
        ("http://127.0.0.1/a.png", "turned off"),
        ("data:image/png;base64,AAAA", "not a picture"),
        ("data:image/png;base64,???", "not valid base64"),
        ("data:image/png,AAAA", "must be base64"),
        (data_url(0)[:-40], "broken"),
        (data_url(0, (7000, 1)), "elongated"),
    ],
)
def test_a_picture_that_cannot_be_used_is_refused_by_its_part(client, url, words):
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, question("a"), {"role": "assistant", "content": "b"}, question("c", url))
    assert words in caught.value.message
    assert caught.value.param == "messages[2].content[0].image_url"
    assert "/etc" not in caught.value.message


def test_a_prompt_over_the_context_is_refused(client):
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, question("x" * 200))
    assert caught.value.code == "context_length_exceeded"


def test_an_answer_fills_at_most_the_context(client):
    found = chat(client, question("x" * 40), max_tokens=10_000, extra_body={"ignore_eos": True})
    assert found.usage.total_tokens == 128 and found.choices[0].finish_reason == "length"


def test_every_error_has_the_nested_form(live):
    cases = [
        (404, *post(live, "/v1/embeddings", {})),
        (404, *post(live, "/nothing", {})),
        (405, *post(live, "/v1/models", {})),
        (415, *post(live, "/v1/chat/completions", {}, **{"Content-Type": "text/plain"})),
        (400, *post(live, "/v1/chat/completions", b"{")),
        (403, *post(live, "/v1/chat/completions", {}, Host="elsewhere.example")),
        (400, *post(live, "/v1/chat/completions", {})),
    ]
    for wanted, status, body, _ in cases:
        assert status == wanted and set(body["error"]) == {"message", "type", "param", "code"}


def test_a_body_over_the_limit_is_refused_while_it_arrives(live):
    status, body, _ = post(live, "/v1/chat/completions", b" " * 33_000_000)
    assert (status, body["error"]["code"]) == (413, "too_large")


def test_clients_that_leave_hold_nothing(live, model):
    body = {"model": "tiny", "messages": [question("long?", data_url(0))], "max_tokens": 100,
            "ignore_eos": True, "n": 2}  # fmt: skip
    for i in range(20):
        data = json.dumps(body | {"stream": i % 2 == 0}).encode()
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        with socket.create_connection(("127.0.0.1", live.port)) as connection:
            connection.sendall(head.encode() + data)
            time.sleep(0.01 * (i % 7))
    live.wait_idle()
    status, answer, _ = post(live, "/v1/chat/completions", body | {"max_tokens": 3})
    assert status == 200 and len(answer["choices"]) == 2


def test_more_than_the_queue_holds_is_refused_with_retry_after(live, monkeypatch):
    body = {"messages": [question("full?")], "max_tokens": 60, "ignore_eos": True, "n": 8}
    device, full = live.model.engine.device, threading.Event()
    decode = device.decode
    # No answer ends before the queue has been full.
    monkeypatch.setattr(device, "decode", lambda *args: (full.wait(30), decode(*args))[1])

    def ask(_):
        found = post(live, "/v1/chat/completions", body)
        if found[0] == 503:
            full.set()
        return found

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        found = list(pool.map(ask, range(16)))
    statuses = [status for status, _, _ in found]
    assert set(statuses) == {200, 503}
    refused = next(entry for entry in found if entry[0] == 503)
    assert refused[2].headers["Retry-After"] == "1"
    assert refused[1]["error"]["code"] == "overloaded"


def test_connections_without_a_request_are_closed(live):
    idle = [socket.create_connection(("127.0.0.1", live.port)) for _ in range(20)]
    half = socket.create_connection(("127.0.0.1", live.port))
    half.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n")
    assert (
        post(live, "/v1/chat/completions", {"messages": [question("a")], "max_tokens": 2})[0] == 200
    )
    for connection in [*idle, half]:
        connection.settimeout(10)
        assert connection.recv(1) == b""
        connection.close()


def test_a_fault_in_a_step_fails_its_requests_and_the_next_works(live, client, monkeypatch):
    device = live.model.engine.device
    decode, left = device.decode, [1]

    def broken(*arguments):
        if left.pop() if left else 0:
            raise RuntimeError("a step failed")
        return decode(*arguments)

    monkeypatch.setattr(device, "decode", broken)
    with pytest.raises(openai.InternalServerError) as caught:
        chat(client, question("fault?"), max_tokens=20, extra_body={"ignore_eos": True})
    assert caught.value.code == "engine_failed" and "step" not in caught.value.message
    before = live.model.engine.counts.compilations
    assert chat(client, question("again?")).choices[0].finish_reason
    assert live.model.engine.counts.compilations == before


def test_metrics_have_the_names_that_gateways_look_for(live):
    connection = http.client.HTTPConnection("127.0.0.1", live.port)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert f"vllm:{name}{{" in text
    assert "llava:compilations" in text
    connection.request("HEAD", "/metrics")
    assert connection.getresponse().status == 200


def test_health_ready_and_the_page_need_no_key(model):
    live = LiveServer(model, keys=("secret",))
    try:
        connection = http.client.HTTPConnection("127.0.0.1", live.port)
        guarded = ("/metrics", "/v1/models", "/version", "/nothing")
        for path in ("/", "/health", "/ready", *guarded):
            connection.request("GET", path)
            response = connection.getresponse()
            response.read()
            assert response.status == (401 if path in guarded else 200), path
        connection.request("GET", "/v1/models", headers={"Authorization": "Bearer secret"})
        assert connection.getresponse().status == 200
        connection.close()
        live.server.draining = True
        connection.request("GET", "/ready")
        assert connection.getresponse().status == 503
        status, body, response = post(
            live,
            "/v1/chat/completions",
            {"messages": [question("a")]},
            Authorization="Bearer secret",
        )
        assert (status, response.headers["Retry-After"]) == (503, "5")
    finally:
        live.close()


def test_the_page_runs_nothing_but_its_own_script(live):
    connection = http.client.HTTPConnection("127.0.0.1", live.port)
    connection.request("GET", "/")
    response = connection.getresponse()
    page = response.read()
    assert len(page) < 60_000 and b"http://" not in page.replace(b"http://www.w3.org/2000/svg", b"")
    policy = response.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert b" style=" not in page and b" onclick=" not in page
