"""Fields of a request: honoured, harmless, or refused by name."""

import json

import pytest

from llava_jax.serving.api import (
    HARMLESS,
    READ_ELSEWHERE,
    SAMPLING,
    WITHOUT_EFFECT,
    ApiError,
    Defaults,
    Limits,
    parse_json,
    read_settings,
)

NAMES = ("tiny", "org/tiny")
LIMITS = Limits()


def settings(chat=True, limits=LIMITS, **body):
    return read_settings(body, NAMES, limits, Defaults(), chat)


def refusal(chat=True, **body) -> ApiError:
    with pytest.raises(ApiError) as caught:
        settings(chat, **body)
    return caught.value


def test_null_is_the_default_of_every_field():
    fields = (
        "model temperature top_p top_k min_p n seed stop max_tokens max_completion_tokens stream "
        "logprobs top_logprobs presence_penalty frequency_penalty logit_bias response_format tools "
        "tool_choice user stream_options stop_token_ids ignore_eos min_tokens audio modalities"
    ).split()
    asked = settings(**dict.fromkeys(fields))
    assert asked.model == "tiny" and asked.max_tokens is None and not asked.unknown
    assert (asked.params.temperature, asked.params.top_p, asked.params.n) == (0.0, 1.0, 1)


def test_sampling_fields_are_honoured():
    asked = settings(
        temperature=0.7, top_p=0.9, top_k=5, min_p=0.1, n=2, seed=-1, stop="a", max_tokens=7,
        stop_token_ids=[3], ignore_eos=True, min_tokens=2, repetition_penalty=1.1,
        logprobs=True, top_logprobs=3,
    )  # fmt: skip
    params = asked.params
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.7, 0.9, 5, 0.1)
    assert (params.n, params.seed, params.stop, params.max_tokens) == (2, 2**32 - 1, ("a",), 7)
    assert (params.stop_token_ids, params.ignore_eos, params.min_tokens) == ((3,), True, 2)
    assert (params.repetition_penalty, params.logprobs, asked.logprobs) == (1.1, 3, True)


def test_the_newer_name_of_max_tokens_wins():
    assert settings(max_tokens=5, max_completion_tokens=6).max_tokens == 6


def test_without_a_seed_answers_differ():
    assert settings().params.seed != settings().params.seed


@pytest.mark.parametrize(
    "field, value",
    [
        ("response_format", {"type": "json_object"}),
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("logit_bias", {"1": 2}),
        ("presence_penalty", 0.5),
        ("frequency_penalty", -1),
        ("modalities", ["audio"]),
        ("audio", {"voice": "a"}),
        ("temperature", -1),
        ("temperature", "hot"),
        ("temperature", float("nan")),
        ("top_p", 0),
        ("top_k", -2),
        ("n", 0),
        ("n", 9),
        ("n", True),
        ("seed", 1.5),
        ("stop", ["a"] * 5),
        ("stop", ["x" * 257]),
        ("stop", [1]),
        ("stop", 7),
        ("stop_token_ids", list(range(17))),
        ("max_tokens", 0),
        ("max_completion_tokens", -1),
        ("max_tokens", 2.5),
        ("stream", "yes"),
        ("top_logprobs", 3),
        ("prompt_logprobs", 1),
        ("stream_options", 3),
        ("ignore_eos", 1),
        ("contrast", "blur"),
        ("contrast_alpha", 2),
    ],
)
def test_a_value_that_cannot_be_honoured_is_refused_by_name(field, value):
    error = refusal(**{field: value})
    assert (error.status, error.param) == (400, field)
    assert field in error.message and not error.message.endswith(".")


def test_top_logprobs_over_the_limit():
    assert refusal(logprobs=True, top_logprobs=21).param == "top_logprobs"
    assert refusal(chat=False, logprobs=21).param == "logprobs"


def test_an_unknown_model_is_404_with_the_names():
    error = refusal(model="gpt")
    assert (error.status, error.param, error.code) == (404, "model", "model_not_found")
    assert "org/tiny" in error.message


def test_unknown_fields_are_listed_not_refused():
    assert settings(guided_json={}, foo=1).unknown == ("foo", "guided_json")


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"3", b'{"a": NaN}', b"\xff", b"[" * 100_000])
def test_a_body_that_is_no_json_object_is_refused(body):
    with pytest.raises(ApiError) as caught:
        parse_json(body)
    assert caught.value.status == 400


def test_errors_have_the_nested_form():
    body = refusal(n=0).body()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    json.dumps(body)


def test_a_refusal_quotes_at_most_80_characters():
    assert len(refusal(tool_choice="x" * 10_000).message) < 200


# In one order: workers must collect the same tests.
@pytest.mark.parametrize("field", sorted({*SAMPLING, *READ_ELSEWHERE, *HARMLESS, *WITHOUT_EFFECT}))
def test_no_value_of_any_field_is_a_fault_of_the_server(field):
    """Each is taken or refused, in a sentence that does not repeat it in full."""
    limits = Limits(prompt_logprobs=True, contrast=True)
    for value in (
        None, 0, -1, 2**31, 2**70, 10**4000, 1e308, float("inf"), 0.5, True, "", "x" * 10**5,
        "\ud800", [], [1], ["a"], [[]], [None], [2**70], ["a"] * 50, [{}], {}, {"a": 1},
    ):  # fmt: skip
        for chat in (True, False):
            try:
                settings(chat, limits, **{field: value})
            except ApiError as error:
                assert 400 <= error.status < 500 and len(error.message) < 300
                json.dumps(error.body()).encode()


def test_a_body_of_very_many_fields_is_refused():
    with pytest.raises(ApiError, match="at most 200 fields"):
        parse_json(json.dumps(dict.fromkeys(map(str, range(201)))).encode())
