"""Contrastive decoding over HTTP: the answer of Python, and refusals that name the field."""

import json
import urllib.error
import urllib.request

import pytest

from llava_jax.errors import LlavaError
from llava_jax.serving import serve
from llava_jax.serving.api import Limits
from tests.serving.live_server import LiveServer, data_url, question
from tests.serving.test_serve_command import arguments
from tests.tiny_model import random_image


@pytest.fixture(scope="module")
def live(model):
    server = LiveServer(model, limits=Limits(contrast=True))
    yield server
    server.close()


def post(live, picture=None, **fields) -> dict:
    """The JSON of the response to a question, of an error too."""
    asked = question("what?", *([] if picture is None else [data_url(picture)]))
    body = {"messages": [asked], "max_tokens": 8, **fields}
    request = urllib.request.Request(
        f"{live.url}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        return json.loads(urllib.request.urlopen(request).read())
    except urllib.error.HTTPError as error:
        assert error.code == 400
        return json.loads(error.read())


def test_an_answer_is_that_of_python(live, model):
    settings = {"contrast": "noise", "contrast_alpha": 2, "contrast_beta": 0.01}
    found = post(live, 1, **settings)["choices"][0]["message"]["content"]
    assert found == model.generate("what?", random_image(1), max_tokens=8, **settings)
    live.wait_idle()


@pytest.mark.parametrize(
    "picture, fields, param, words",
    [
        (None, {"contrast": "blur"}, "contrast", "no picture to decode against"),
        (1, {"contrast": "dark"}, "contrast", "one of blur, noise, absent"),
        (1, {"contrast": "blur", "contrast_alpha": -1}, "contrast_alpha", "from 0 to 100"),
        (1, {"contrast_beta": 0.5}, "contrast_beta", "give contrast too"),
    ],
)
def test_what_is_wrong_is_refused_by_name(live, picture, fields, param, words):
    error = post(live, picture, **fields)["error"]
    assert error["param"] == param and words in error["message"]
    live.wait_idle()


def test_a_server_allows_it_only_if_it_is_told_to(model):
    live = LiveServer(model)
    try:
        error = post(live, 1, contrast="blur")["error"]
        assert error["param"] == "contrast" and "turned off" in error["message"]
    finally:
        live.close()
    assert serve.make_server(arguments("--contrast")).options.limits.contrast
    with pytest.raises(LlavaError, match="--contrast takes two rows .*--batch_size of at least 3"):
        serve.make_server(arguments("--contrast", "--batch_size", "2", "--replicas", "2"))
