"""OpenAI's chat and text completions: a request's JSON checked, an answer's JSON made.

Every field of a request is honoured, accepted because it cannot change the answer, or refused with
a sentence that names it. Reference: https://platform.openai.com/docs/api-reference/chat; the
sampling names beyond OpenAI's are vLLM's.
"""

import json
import math
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from llava_jax.errors import LlavaError
from llava_jax.inference.answer import TokenLogprob
from llava_jax.inference.jobs import Job
from llava_jax.inference.sampling import SamplingParams

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
    "stop_token_ids", "prompt_logprobs", "n",
)  # fmt: skip
READ_ELSEWHERE = frozenset(
    "model messages prompt max_tokens max_completion_tokens stop seed logprobs top_logprobs "
    "stream".split()
)
LEAST_LOGPROB = -9999.0  # JSON has no infinity; the value that vLLM writes


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
      max_tokens: of an answer whose request names no limit; None for what the context leaves.
    """

    body_bytes: int = 32_000_000
    messages: int = 256
    parts: int = 1024
    images: int = 8
    answers: int = 8
    stop_texts: int = 4
    stop_characters: int = 256
    stop_tokens: int = 16
    top_logprobs: int = 20
    prompt_logprobs: bool = False
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
        model=_model(body.get("model"), names),
        params=params,
        max_tokens=max_tokens,
        stream=_switch(body, "stream"),
        include_usage=_include_usage(body),
        logprobs=params.logprobs is not None,
        unknown=tuple(sorted(name for name in body if name not in known)),
    )


def _model(name, names: Sequence[str]) -> str:
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
        raise _refused("n", f"n may be at most {limits.answers}, not {given['n']}")
    if len(given.get("stop_token_ids") or ()) > limits.stop_tokens:
        raise _refused("stop_token_ids", f"stop_token_ids may hold at most {limits.stop_tokens}")
    if "prompt_logprobs" in given and not limits.prompt_logprobs:
        raise _refused("prompt_logprobs", "prompt_logprobs is turned off on this server")
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
        at_fault = next((n for n in (*SAMPLING, "stop") if str(error).startswith(n)), None)
        raise _refused(at_fault, str(error)) from None


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
    """A client's value as messages show it: JSON of at most 80 characters."""
    text = json.dumps(value, ensure_ascii=True, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."


@dataclass
class Reply:
    """The JSON of the answers to one request, whole or in chunks.

    Args:
      chat: chat completion or text completion.
      model: the name that was asked for.
      token_text: (token id) -> its text, for log probabilities.
    """

    chat: bool
    model: str
    fingerprint: str
    token_text: object
    logprobs: bool = False
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, jobs: Sequence[Job]) -> dict:
        """The body of an answer that is not streamed."""
        choices = []
        for index, answer in enumerate(job.answer for job in jobs):
            content = {"message": {"role": "assistant", "content": answer.text, "refusal": None}}
            choice = {"index": index, **(content if self.chat else {"text": answer.text})}
            choice["logprobs"] = self._logprobs(answer.logprobs)
            choice["finish_reason"] = answer.finish_reason
            choices.append(choice)
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._head(kind), "choices": choices, "usage": usage(jobs)}

    def first_chunk(self, index: int) -> dict | None:
        """The chunk that names the role; text completions have none."""
        if not self.chat:
            return None
        return self._chunk(index, {"role": "assistant", "content": ""})

    def chunk(self, index: int, text: str, logprobs: Sequence[TokenLogprob] = ()) -> dict:
        """A piece of an answer's text."""
        return self._chunk(index, {"content": text}, text, logprobs=logprobs)

    def last_chunk(self, index: int, finish_reason: str) -> dict:
        """The end of one answer."""
        return self._chunk(index, {}, finish_reason=finish_reason)

    def usage_chunk(self, jobs: Sequence[Job]) -> dict:
        """The chunk behind the last, sent only to clients that ask for it."""
        return {**self._head(self._kind_of_chunk), "choices": [], "usage": usage(jobs)}

    @property
    def _kind_of_chunk(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _chunk(self, index, delta, text="", finish_reason=None, logprobs=()) -> dict:
        content = {"delta": delta} if self.chat else {"text": text}
        choice = {"index": index, **content, "logprobs": self._logprobs(logprobs) if text else None}
        choice["finish_reason"] = finish_reason
        return {**self._head(self._kind_of_chunk), "choices": [choice]}

    def _head(self, kind: str) -> dict:
        prefix = "chatcmpl" if self.chat else "cmpl"
        return {
            "id": f"{prefix}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> dict | None:
        if not self.logprobs:
            return None
        if self.chat:
            entries = []
            for entry in logprobs:
                top = [self._token(token, value) for token, value in entry.top.items()]
                entries.append(self._token(entry.token, entry.logprob) | {"top_logprobs": top})
            return {"content": entries, "refusal": None}
        texts = [self.token_text(entry.token) for entry in logprobs]
        return {
            "tokens": texts,
            "token_logprobs": [_finite(entry.logprob) for entry in logprobs],
            "top_logprobs": [
                {self.token_text(token): _finite(value) for token, value in entry.top.items()}
                for entry in logprobs
            ],
            "text_offset": [sum(map(len, texts[:i])) for i in range(len(texts))],
        }

    def _token(self, token: int, logprob: float) -> dict:
        text = self.token_text(token)
        return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode())}


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else LEAST_LOGPROB


def usage(jobs: Sequence[Job]) -> dict:
    """Tokens of a request: its prompt once, and all its answers without the ones that end them."""
    prompt, written = jobs[0].length, sum(len(job.answer.tokens) for job in jobs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
        "prompt_tokens_details": {
            "cached_tokens": jobs[0].shared,
            "image_tokens": sum(len(picture.layout) for picture in jobs[0].request.pictures),
        },
    }
