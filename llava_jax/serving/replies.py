"""OpenAI's chat and text completions: an answer's JSON, whole or in chunks.

Reference: https://platform.openai.com/docs/api-reference/chat; `prompt_logprobs` are vLLM's.
"""

import functools
import itertools
import math
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from llava_jax.inference.answer import BYTE, REPLACEMENT, TokenLogprob
from llava_jax.inference.jobs import Job

LEAST_LOGPROB = -9999.0  # JSON has no infinity; the value that vLLM writes
SPACE = "\u2581"  # how SentencePiece writes a space


@dataclass
class Reply:
    """The JSON of the answers to one request, whole or in chunks.

    Args:
      chat: chat completion or text completion.
      model: the name that was asked for.
      tokens: their texts, for log probabilities.
    """

    chat: bool
    model: str
    fingerprint: str
    tokens: "TokenTexts"
    logprobs: bool = False
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))
    _offsets: dict[int, int] = field(default_factory=dict)  # characters of tokens, by answer

    def whole(self, jobs: Sequence[Job]) -> dict:
        """The body of an answer that is not streamed."""
        choices = []
        for index, answer in enumerate(job.answer for job in jobs):
            content = {"message": {"role": "assistant", "content": answer.text, "refusal": None}}
            choice = {"index": index, **(content if self.chat else {"text": answer.text})}
            choice["logprobs"] = self._logprobs(answer.logprobs, index)
            choice["finish_reason"] = answer.finish_reason
            if jobs[0].request.params.prompt_logprobs is not None:  # of each answer, as vLLM writes
                choice["prompt_logprobs"] = self._prompt_logprobs(answer.prompt_logprobs)
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
        logprobs = self._logprobs(logprobs, index) if logprobs else None
        choice = {"index": index, **content, "logprobs": logprobs}
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

    def _logprobs(self, logprobs: Sequence[TokenLogprob], index: int) -> dict | None:
        if not self.logprobs:
            return None
        if self.chat:
            entries = []
            for entry in logprobs:
                top = [self._token(token, value) for token, value in entry.top.items()]
                entries.append(self._token(entry.token, entry.logprob) | {"top_logprobs": top})
            return {"content": entries, "refusal": None}
        texts = [self.tokens.text(entry.token) for entry in logprobs]
        start = self._offsets.get(index, 0)
        offsets = list(itertools.accumulate(map(len, texts), initial=start))
        self._offsets[index] = offsets.pop()
        return {
            "tokens": texts,
            "token_logprobs": [_finite(entry.logprob) for entry in logprobs],
            "top_logprobs": [
                {self.tokens.text(token): _finite(value) for token, value in entry.top.items()}
                for entry in logprobs
            ],
            "text_offset": offsets,
        }

    def _prompt_logprobs(self, logprobs: Sequence[TokenLogprob]) -> list[dict | None]:
        """For each token of the prompt, id -> log probability, rank, text; null for the first."""
        entries: list[dict | None] = [None]
        for entry in logprobs:
            ranks = {token: rank for rank, token in enumerate(entry.top, 1)}
            entries.append(
                {
                    str(token): {
                        "logprob": _finite(value),
                        "rank": ranks.get(token),
                        "decoded_token": self.tokens.text(token),
                    }
                    for token, value in ({entry.token: entry.logprob} | entry.top).items()
                }
            )
        return entries

    def _token(self, token: int, logprob: float) -> dict:
        return {
            "token": self.tokens.text(token),
            "logprob": _finite(logprob),
            "bytes": list(self.tokens.bytes(token)),
        }


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


class TokenTexts:
    """The text and the bytes of single tokens.

    Args:
      tokenizer: a Hugging Face tokenizer, byte-level or of SentencePiece.
    """

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self.text = functools.lru_cache(1 << 16)(self._text)
        self.bytes = functools.lru_cache(1 << 16)(self._bytes)

    def _text(self, token: int) -> str:
        name = self._tokenizer.convert_ids_to_tokens(token) or ""
        if SPACE in name:  # decoding drops the space in front of a first word
            return name.replace(SPACE, " ")
        return self._tokenizer.decode([token], clean_up_tokenization_spaces=False)

    def _bytes(self, token: int) -> bytes:
        """The token's own bytes, also if they are only a part of a character's."""
        name = self._tokenizer.convert_ids_to_tokens(token) or ""
        if BYTE.fullmatch(name):
            return bytes([int(name[1:-1], 16)])
        text = self.text(token)
        if REPLACEMENT in text and all(letter in LETTER_BYTES for letter in name):
            return bytes(LETTER_BYTES[letter] for letter in name)
        return text.encode()


def _letter_bytes() -> dict[str, int]:
    """The letter by which byte-level tokenizers write each byte (GPT-2's `bytes_to_unicode`)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in shown]
    return {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(rest)}


LETTER_BYTES = _letter_bytes()
