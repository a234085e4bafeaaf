"""OpenAI's chat and text completions: a request's JSON checked.

Every field of a request is honoured, accepted because it cannot change the answer, or refused with
a sentence that names it. Reference: https://platform.openai.com/docs/api-reference/chat; the
sampling names beyond OpenAI's are vLLM's; `contrast` and its two numbers are our own.
"""

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llava_jax.errors import LlavaError
from llava_jax.inference.sampling import CONTRAST_FIELDS, SamplingParams
from llava_jax.models.llava import LlavaConfig

# Fields that cannot change an answer of this server.
HARMLESS = frozenset(
    "user metadata store service_tier safety_identifier prompt_cache_key prompt_cache_retention "
    "parallel_tool_calls verbosity stream_options request_id priority".split()
)
# Fields of features that this server does not have: accepted only with a value that asks for none.
WITHOUT_EFFECT = {
    "response_format": (None, {"type": "text"}),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "logit_bias": (None, {}),
    "audio": (None,),
    "modalities": (None, ["text"]),
    "prediction": (None,),
    "reasoning_effort": (None, "none"),
    "web_search_options": (None,),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "suffix": (None, ""),
    "echo": (None, False),
    "best_of": (None, 1),
}
# Sampling fields, by the same name in SamplingParams. null means the default.
SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "min_tokens", "ignore_eos",
    "stop_token_ids", "prompt_logprobs", "n", *CONTRAST_FIELDS,
)  # fmt: skip
READ_ELSEWHERE = frozenset(
    "model messages prompt max_tokens max_completion_tokens stop seed logprobs top_logprobs "
    "stream".split()
)
FIELDS = 200  # of one request


class ApiError(Exception):
    """A request that is answered with an error in OpenAI's nested form.

    Args:
      status: of HTTP.
      message: one sentence for the client, with nothing of this machine in it.
      param: the field at fault.
      code: a short name of the fault.
      retry_after: seconds, for 429 and 503.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status, self.message = status, message
        self.param, self.code, self.retry_after = param, code, retry_after

    def headers(self) -> dict[str, str]:
        headers = {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(self.retry_after)
        return headers

    def body(self) -> dict:
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": self.message,
                "type": kinds.get(self.status, kind),
                "param": self.param,
                "code": self.code,
            }
        }


@dataclass(frozen=True)
class Limits:
    """What one request may ask for.

    Attributes:
      characters: of all texts of a request together.
      max_tokens: of an answer whose request names no limit; None for what the context leaves.
    """

    body_bytes: int = 32_000_000
    messages: int = 256
    parts: int = 1024
    images: int = 8
    answers: int = 8
    stop_texts: int = 4
    stop_characters: int = 256
    characters: int = 1_000_000
    stop_tokens: int = 16
    top_logprobs: int = 20
    prompt_logprobs: bool = False
    contrast: bool = False
    max_tokens: int | None = None


@dataclass(frozen=True)
class Defaults:
    """Values of fields that a request leaves out."""

    temperature: float = 0.0
    top_p: float = 1.0


@dataclass(frozen=True)
class Asked:
    """A request apart from its messages or prompt.

    Attributes:
      model: the served name, as asked for.
      params: with `max_tokens` 1 as a stand-in if `max_tokens` is None.
      max_tokens: tokens an answer may have; None for what the context leaves.
      logprobs: whether log probabilities are part of the answer.
      unknown: fields that are not known here, and were not read.
    """

    model: str
    params: SamplingParams
    max_tokens: int | None
    stream: bool
    include_usage: bool
    logprobs: bool
    unknown: tuple[str, ...] = ()


def parse_json(body: bytes) -> dict:
    """A request's body; ApiError if it is no JSON object."""
    try:
        value = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is not JSON", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    if len(value) > FIELDS:
        raise ApiError(400, f"a request may have at most {FIELDS} fields", code="invalid_json")
    return value


def _no_constant(name: str):
    raise ValueError(name)


def read_settings(
    body: Mapping, names: Sequence[str], limits: Limits, defaults: Defaults, chat: bool
) -> Asked:
    """Everything of a request but its messages or prompt.

    Args:
      names: the served model's names; the first is its own.
      chat: whether this is a chat completion, whose `logprobs` is a switch and not a number.
    """
    for name, allowed in WITHOUT_EFFECT.items():
        if name in body and body[name] not in allowed:
            raise _refused(name, f"this server does not support {name}={shortened(body[name])}")
    known = {*HARMLESS, *WITHOUT_EFFECT, *SAMPLING, *READ_ELSEWHERE}
    params, max_tokens = _sampling(body, limits, defaults, chat)
    return Asked(
        model=read_model(body.get("model"), names),
        params=params,
        max_tokens=max_tokens,
        stream=_switch(body, "stream"),
        include_usage=_include_usage(body),
        logprobs=params.logprobs is not None,
        unknown=tuple(sorted(name for name in body if name not in known)),
    )


def read_model(name, names: Sequence[str]) -> str:
    """The served name that a request asks for; by default the first."""
    if name in (None, ""):
        return names[0]
    if name not in names:
        raise ApiError(
            404,
            f"the model {shortened(name)} is not served here: ask for {' or '.join(names)}",
            "model",
            "model_not_found",
        )
    return name


def _sampling(
    body: Mapping, limits: Limits, defaults: Defaults, chat: bool
) -> tuple[SamplingParams, int | None]:
    given = {name: body[name] for name in SAMPLING if body.get(name) is not None}
    given.setdefault("temperature", defaults.temperature)
    given.setdefault("top_p", defaults.top_p)
    given["seed"] = _seed(body.get("seed"))
    given["stop"] = _stop(body.get("stop"), limits)
    given["logprobs"] = _logprobs(body, limits, chat)
    if _is_count(given.get("n")) and given["n"] > limits.answers:
        raise _refused("n", f"n may be at most {limits.answers}, not {shortened(given['n'])}")
    stop_token_ids = given.get("stop_token_ids")
    if isinstance(stop_token_ids, list) and len(stop_token_ids) > limits.stop_tokens:
        raise _refused("stop_token_ids", f"stop_token_ids may hold at most {limits.stop_tokens}")
    for name in ("prompt_logprobs", "contrast"):
        if name in given and not getattr(limits, name):
            raise _refused(name, f"{name} is turned off on this server")
    if "prompt_logprobs" in given and body.get("stream"):
        raise _refused("prompt_logprobs", "prompt_logprobs are not streamed: leave out stream")
    max_tokens, name = limits.max_tokens, "max_tokens"
    for field_name in ("max_completion_tokens", "max_tokens"):
        if body.get(field_name) is not None:
            max_tokens, name = body[field_name], field_name
            break
    if max_tokens is not None and not (_is_count(max_tokens) and max_tokens >= 1):
        raise _refused(name, f"{name} must be a whole number from 1, not {shortened(max_tokens)}")
    given["max_tokens"] = min(max_tokens, 2**30) if max_tokens else 2**30
    try:
        return SamplingParams(**given), max_tokens
    except LlavaError as error:
        message = str(error)
        short = message if len(message) < 200 else f"{message[:197]}..."
        raise _refused(_field_at_fault(message), short) from None


def _field_at_fault(message: str) -> str | None:
    """The sampling field that a message begins with; None if it begins with another word."""
    first, *_ = message.replace("each of ", "").split(maxsplit=1)
    return first if first in (*SAMPLING, "stop") else None


def refused_prompt(error: LlavaError, param: str) -> ApiError:
    """Why a prompt cannot be answered: the fault of `param`, or of a field that does not fit it."""
    return ApiError(400, str(error), _field_at_fault(str(error)) or param, "invalid_prompt")


def _seed(seed) -> int:
    """Any 64-bit integer, folded; a random one if the request names none."""
    if seed is None:
        return secrets.randbits(32)
    if not _is_count(seed):
        raise _refused("seed", f"seed must be a whole number, not {shortened(seed)}")
    return seed % 2**32


def _stop(stop, limits: Limits) -> tuple[str, ...]:
    texts = () if stop is None else (stop,) if isinstance(stop, str) else stop
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise _refused("stop", f"stop must be a text or a list of texts, not {shortened(stop)}")
    texts = tuple(text for text in texts if text)
    if len(texts) > limits.stop_texts:
        raise _refused("stop", f"stop may hold at most {limits.stop_texts} texts")
    if any(len(text) > limits.stop_characters for text in texts):
        raise _refused("stop", f"a text of stop may have {limits.stop_characters} characters")
    return texts


def _logprobs(body: Mapping, limits: Limits, chat: bool) -> int | None:
    """Alternatives wanted for each token; None for no log probabilities at all."""
    name = "top_logprobs" if chat else "logprobs"
    count = body.get(name)
    if chat and not _switch(body, "logprobs"):
        if count:
            raise _refused(name, "top_logprobs needs logprobs to be true")
        return None
    if count is None:
        return 0 if chat else None
    if not _is_count(count) or not 0 <= count <= limits.top_logprobs:
        raise _refused(
            name,
            f"{name} must be from 0 to {limits.top_logprobs}, not {shortened(count)}",
        )
    return count


def _include_usage(body: Mapping) -> bool:
    options = body.get("stream_options")
    if options is not None and not isinstance(options, Mapping):
        raise _refused("stream_options", "stream_options must be an object")
    return bool(options and options.get("include_usage"))


def _switch(body: Mapping, name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise _refused(name, f"{name} must be true or false, not {shortened(value)}")
    return bool(value)


def _is_count(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _refused(param: str | None, message: str) -> ApiError:
    return ApiError(400, message, param, "invalid_value")


def shortened(value) -> str:
    """A client's value as messages show it: at most 80 characters, and no work for large ones."""
    if isinstance(value, list | dict) and len(value) > 0:
        return "a list" if isinstance(value, list) else "an object"
    text = json.dumps(value[:80] if isinstance(value, str) else value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def picture_card(config: LlavaConfig) -> dict:
    """What `/v1/models` says about pictures: what clients need to shrink and to count them."""
    spec = config.image
    sides = [max(grid) for grid in spec.tiling.grids] if spec.tiling else [1]
    return {
        "image_mode": spec.mode,
        "image_pixels": spec.size * max(sides),  # of the longer side: more are of no use
        "max_image_tokens": config.most_tokens,
    }
