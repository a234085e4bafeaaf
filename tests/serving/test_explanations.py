"""POST /v1/explain and `llava-jax explain`: the same maps as from Python."""

import argparse
import base64
import http.client
import json

import numpy as np
import pytest
from PIL import Image

from llava_jax.errors import LlavaError
from llava_jax.inference.model import Llava
from llava_jax.serving import command_line, explain, explanations, serve
from llava_jax.serving.api import ApiError
from tests.serving.live_server import LiveServer, data_url, question
from tests.serving.test_serve_command import arguments
from tests.tiny_model import random_image

QUEUE = 20  # has room for windows of 4 x 4


@pytest.fixture(scope="module")
def live(model):
    live = LiveServer(model, queue=QUEUE, explanations=True)
    yield live
    live.close()


def post(live, body: dict, path: str = "/v1/explain") -> tuple[int, dict]:
    connection = http.client.HTTPConnection("127.0.0.1", live.port, timeout=60)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def asked(*images: str, answer: str = "xyz", **fields) -> dict:
    answered = {"role": "assistant", "content": answer}
    return {"messages": [question("what?", *images), answered], "windows": 4, **fields}


def test_the_same_maps_as_from_python(live, model):
    before = model.engine.counts.compilations
    status, found = post(live, asked(data_url(0), data_url(1, (80, 40))))
    assert status == 200 and found["object"] == "explanation" and found["model"] == "tiny"
    live.wait_idle()
    assert model.engine.counts.compilations == before
    images = [random_image(0), random_image(1, (80, 40))]
    expected = model.explain("<image>\n<image>\nwhat?", images, "xyz", windows=4)
    assert (found["width"], found["height"]) == (80, 40)
    assert tuple(found["tokens"]) == expected.tokens == ("x", "y", "z")
    np.testing.assert_allclose(found["logprobs"], expected.logprobs, rtol=1e-3)
    attention, drop = np.array(found["attention"]), np.array(found["drop"])
    assert attention.shape == (3, 16, 32) and drop.shape == (3, 2, 2)
    for token in range(3):
        wanted = expected.attention(token, (16, 32))
        np.testing.assert_allclose(attention[token], wanted, rtol=2e-3, atol=1e-9)
        wanted = expected.drop(token, (2, 2))
        np.testing.assert_allclose(drop[token], wanted, rtol=2e-3, atol=1e-5)


def test_earlier_turns_and_other_requests_do_not_matter(live, model):
    history = [question("first?", data_url(2)), {"role": "assistant", "content": "yes"}]
    body = asked(data_url(0))
    body["messages"] = [{"role": "system", "content": "Be brief."}, *history, *body["messages"]]
    status, found = post(live, body)
    assert status == 200
    live.wait_idle()
    given = [("<image>\nfirst?", "yes")]
    images = [random_image(2), random_image(0)]
    expected = model.explain(
        "<image>\nwhat?", images, "xyz", history=given, system="Be brief.", windows=4
    )
    np.testing.assert_allclose(found["logprobs"], expected.logprobs, rtol=1e-3)


BAD_PICTURE = "data:image/png;base64," + base64.b64encode(b"no picture").decode()


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "messages", "the last message must be an assistant's"),
        ({"messages": [question("what?", data_url(0))]}, "messages", "must be an assistant's"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages", "must be a non-empty"),
        (asked(), "messages", "no picture"),
        (asked(data_url(0), answer=""), "messages", "the answer is empty"),
        (asked(data_url(0), answer="x" * 200), "messages", "the context 128"),
        (asked(data_url(0), windows=5), "windows", "from 3 to 4"),
        (asked(data_url(0), windows=True), "windows", "from 3 to 4"),
        (asked(BAD_PICTURE), "messages[0].content[0].image_url.url", "is not a picture"),
        (asked(data_url(0), model="other"), "model", "is not served here"),
    ],
)
def test_a_wrong_request_is_refused_by_its_field(live, body, param, words):
    status, found = post(live, body)
    assert status in (400, 404) and words in found["error"]["message"]
    assert found["error"]["param"].startswith(param.partition("[")[0])
    live.wait_idle()
    assert live.server.guards._held == 0


def test_it_is_off_unless_it_is_turned_on(model):
    live = LiveServer(model)
    try:
        status, found = post(live, asked(data_url(0)))
        assert status == 400 and "--explain" in found["error"]["message"]
        assert not live.server._card("tiny")["explanations"]
    finally:
        live.close()


def test_windows_fit_into_the_queue():
    assert explanations._windows(None, 128) == 8 and explanations._windows(None, QUEUE) == 4
    for value, queue in ((5, QUEUE), (33, 5000)):  # the second: more than any explanation has
        with pytest.raises(ApiError) as caught:
            explanations._windows(value, queue)
        assert caught.value.param == "windows"
    with pytest.raises(LlavaError, match="--explain needs --max_queue to be at least 10"):
        serve.make_server(arguments("--explain", "--max_queue", "9"))


def test_a_client_that_leaves_holds_nothing(live):
    connection = http.client.HTTPConnection("127.0.0.1", live.port, timeout=60)
    body = json.dumps(asked(data_url(0), windows=4))
    connection.request("POST", "/v1/explain", body, {"Content-Type": "application/json"})
    connection.close()
    live.wait_idle()
    assert live.server.guards._held == 0


# The command.


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    explain.add_arguments(parser)
    return explain.main(parser.parse_args([*arguments]))


def test_the_command_writes_both_maps(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Llava, "from_pretrained", lambda *_, **__: model)
    monkeypatch.setattr(command_line, "keep_compilations", lambda: None)
    random_image(0).save(tmp_path / "a.png")
    flags = ["--checkpoint", str(tmp_path), "--image", str(tmp_path / "a.png"), "--prompt", "what?"]
    out = str(tmp_path / "where.png")
    assert run(*flags, "--answer", "xyz", "--out", out, "--windows", "3") == 0
    printed = capsys.readouterr().out
    assert printed.startswith("xyz\nprobability of these 3 tokens") and "nats" in printed
    assert Image.open(out).size[0] == 1000
    monkeypatch.setattr(explain, "load_from_arguments", None)  # what is wrong is said before it
    with pytest.raises(LlavaError, match="cannot write .*where.doc.*: give it a suffix of .*png"):
        run(*flags, "--out", str(tmp_path / "where.doc"))
    with pytest.raises(LlavaError, match="cannot write .*: there is no folder .*nowhere"):
        run(*flags, "--out", str(tmp_path / "nowhere/where.png"))
    with pytest.raises(LlavaError, match="--windows must be from 3 to 32, not 0"):
        run(*flags, "--out", out, "--windows", "0")
