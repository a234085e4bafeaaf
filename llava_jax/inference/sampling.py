"""The choice of the next token from its logits.

B rows, V vocabulary.
"""

import dataclasses
import difflib
import numbers
from collections.abc import Collection, Mapping, Sequence

import flax
import jax
import jax.numpy as jnp
import numpy as np

from llava_jax.errors import LlavaError

MAX_STOP_IDS = 32  # a fixed width, so that no request compiles anything
MAX_LOGPROBS = 20
MAX_ANSWERS = 16_384  # of one request: a mistyped n must not fill the memory
CONTRASTS = ("blur", "noise", "absent")
CONTRAST_FIELDS = ("contrast", "contrast_alpha", "contrast_beta")
GREEDY_BELOW = 1e-5  # temperatures under which logits divided by them leave float32
# Hugging Face's names -> vLLM's, which are ours; `do_sample` is read in `from_names`.
ALIASES = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "num_return_sequences": "n",
    "stop_strings": "stop",
}


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How an answer is chosen, in vLLM's names; LlavaError for a value out of its range.

    Attributes:
      max_tokens: length limit; an answer also ends at the model's last position.
      temperature: 0, or anything below 1e-5, takes the likeliest token each time; otherwise tokens
        are drawn.
      top_p: draw only among the likeliest tokens that together reach this probability.
      seed: the same prompt and seed draw the same answer, whatever else is in the batch.
      top_k: draw only among this many; 0 or -1 for no limit.
      min_p: draw only tokens at least this likely, relative to the likeliest.
      repetition_penalty: over 1 makes tokens of the prompt and the answer less likely
        (https://arxiv.org/abs/1909.05858).
      min_tokens: neither a stop token nor a stop text ends the answer before.
      stop: texts that end the answer and are no part of it, in addition to the template's.
      stop_token_ids: tokens that end it, in addition to the model's own.
      ignore_eos: the ends of the model and of the template do not count.
      n: answers to one prompt, drawn with the seeds seed, seed + 1, ...
      logprobs: give the log probability of each token of the answer, before temperature and
        penalties, and those of this many likeliest tokens; None gives none.
      prompt_logprobs: the same for each token of the prompt but the first.
      contrast: decode against the same prompt with blurred or noised pictures, or with none: of
        CONTRASTS; see contrast.py. `logprobs` are then those of the contrasted logits. None is off.
      contrast_alpha: how much of the other prompt's logits is taken away.
      contrast_beta: only tokens at least this likely, relative to the likeliest, may be chosen.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: int = 0
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    contrast: str | None = None
    contrast_alpha: float = 1.0
    contrast_beta: float = 0.1

    def __post_init__(self):
        stop = (self.stop,) if isinstance(self.stop, str) else _several("stop", self.stop)
        object.__setattr__(self, "stop", stop)
        stop_token_ids = _several("stop_token_ids", self.stop_token_ids)
        object.__setattr__(self, "stop_token_ids", stop_token_ids)
        _whole("max_tokens", self.max_tokens, 1)
        _number("temperature", self.temperature, "a number from 0 to 1000", lambda x: 0 <= x <= 1e3)
        if self.temperature < GREEDY_BELOW:
            object.__setattr__(self, "temperature", 0.0)
        _number("top_p", self.top_p, "above 0 and at most 1", lambda x: 0 < x <= 1)
        _whole("seed", self.seed, 0, 2**32 - 1)
        _whole("top_k", self.top_k, -1)
        _number("min_p", self.min_p, "from 0 to 1", lambda x: 0 <= x <= 1)
        penalty = self.repetition_penalty
        _number("repetition_penalty", penalty, "from 0.01 to 100", lambda x: 0.01 <= x <= 100)
        _whole("min_tokens", self.min_tokens, 0, self.max_tokens)
        if not all(isinstance(text, str) and text for text in stop):
            raise LlavaError(f"stop must be texts, none empty, not {self.stop!r:.80}")
        for token in self.stop_token_ids:
            _whole("each of stop_token_ids", token, 0)
        if not isinstance(self.ignore_eos, bool):
            raise LlavaError(f"ignore_eos must be true or false, not {self.ignore_eos!r}")
        _whole("n", self.n, 1, MAX_ANSWERS)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), 0, MAX_LOGPROBS)
        self._check_contrast()
        for name in ("max_tokens", "seed", "top_k", "min_tokens", "n"):
            # With NumPy's numbers, seed + 1 or -max_tokens may leave the range of their type.
            object.__setattr__(self, name, int(getattr(self, name)))

    def _check_contrast(self) -> None:
        if self.contrast not in (None, *CONTRASTS):
            known = ", ".join(CONTRASTS)
            raise LlavaError(f"contrast must be one of {known}, not {self.contrast!r:.80}")
        _number("contrast_alpha", self.contrast_alpha, "from 0 to 100", lambda x: 0 <= x <= 100)
        _number("contrast_beta", self.contrast_beta, "from 0 to 1", lambda x: 0 <= x <= 1)
        for name in CONTRAST_FIELDS:
            if self.contrast is None and getattr(self, name) != getattr(SamplingParams, name):
                raise LlavaError(f"{name} is without effect: give contrast too, or leave it out")

    def without_contrast(self) -> "SamplingParams":
        """The same, for a prompt without pictures."""
        off = {name: getattr(SamplingParams, name) for name in CONTRAST_FIELDS}
        return dataclasses.replace(self, **off)

    @classmethod
    def from_names(cls, *names: Mapping, other_names: Collection[str] = ()) -> "SamplingParams":
        """From keywords in vLLM's or Hugging Face's names; later mappings override earlier ones.

        other_names: that stand next to them, for the message about an unknown one.
        """
        values = {}
        for some in names:
            values |= resolve_names(some, other_names)
        return cls(**values)


def resolve_names(names: Mapping, other_names: Collection[str] = ()) -> dict:
    """Keywords in vLLM's or Hugging Face's names as fields of SamplingParams.

    `do_sample` false is temperature 0; true is temperature 1 unless one is given.

    Raises:
      LlavaError: a name that is neither; the message has the closest one.
    """
    values = {}
    known = [field.name for field in dataclasses.fields(SamplingParams)]
    for name, value in names.items():
        ours = ALIASES.get(name, name)
        if ours not in (*known, "do_sample"):
            near = [*other_names, *known, *ALIASES, "do_sample"]
            close = difflib.get_close_matches(name, near, 1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(near)}"
            kind = "key" if other_names else "sampling parameter"
            raise LlavaError(f"unknown {kind} {name!r:.80}: {hint}")
        if ours in values:
            raise LlavaError(f"{name} and {ours} mean the same: give one of them")
        values[ours] = value
    if "do_sample" in values:
        drawn, temperature = values.pop("do_sample"), values.get("temperature")
        if not isinstance(drawn, bool):
            raise LlavaError(f"do_sample must be true or false, not {drawn!r}")
        if drawn and temperature == 0:
            raise LlavaError("do_sample is true but temperature is 0: give one of them")
        values["temperature"] = (1.0 if temperature is None else temperature) if drawn else 0.0
    return values


def _several(name: str, value) -> tuple:
    if value is not None and not isinstance(value, Sequence):
        raise LlavaError(f"{name} must be a list, not {value!r:.80}")
    return tuple(value or ())


def _whole(name: str, value, low: int, high: int = 2**30) -> None:
    """Raises LlavaError unless a number is whole and in range; devices count in int32."""
    right = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not right or not low <= value <= high:
        limits = f"from {low}" + ("" if high == 2**30 else f" to {high}")
        raise LlavaError(f"{name} must be a whole number {limits}, not {value!r:.80}")


def _number(name: str, value, wanted: str, fits) -> None:
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or not fits(value):
        raise LlavaError(f"{name} must be {wanted}, not {value!r}")


@flax.struct.dataclass
class Sampling:
    """The settings of rows as arrays; fields that are not explained are those of SamplingParams.

    Attributes:
      temperature, top_p, min_p, repetition_penalty: float32[B].
      top_k: int32[B], 0 for no limit.
      seed: uint32[B]. A row's random numbers depend on it and on the position of the token alone,
        so a row is drawn the same in every batch.
      stop_ids: int32[B, MAX_STOP_IDS], -1 after the last.
      first_end: int32[B], the first position at which one of them may stand.
      logprobs: bool[B].
    """

    temperature: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    repetition_penalty: jax.Array
    top_k: jax.Array
    seed: jax.Array
    stop_ids: jax.Array
    first_end: jax.Array
    logprobs: jax.Array

    @classmethod
    def zeros(cls, rows: int) -> "Sampling":
        """Greedy settings without an end, as NumPy arrays to be filled in."""
        real = lambda value: np.full(rows, value, np.float32)
        whole = lambda dtype: np.zeros(rows, dtype)
        stop_ids = np.full((rows, MAX_STOP_IDS), -1, np.int32)
        return cls(
            real(0), real(1), real(0), real(1), whole(np.int32), whole(np.uint32), stop_ids,
            whole(np.int32), whole(bool),
        )  # fmt: skip

    def fill(self, row: int, params: SamplingParams, stop_ids: Sequence[int], length: int) -> None:
        """Puts the settings of an answer to a prompt of `length` tokens into a row."""
        for name in ("temperature", "top_p", "min_p", "repetition_penalty", "seed"):
            getattr(self, name)[row] = getattr(params, name)
        self.top_k[row] = max(params.top_k, 0)
        self.stop_ids[row] = -1
        self.stop_ids[row, : len(stop_ids)] = stop_ids
        self.first_end[row] = length + params.min_tokens
        self.logprobs[row] = params.logprobs is not None


def sample(
    logits: jax.Array, sampling: Sampling, positions: jax.Array, seen: jax.Array
) -> jax.Array:
    """Next tokens int32[B].

    Args:
      logits: float32[B, V].
      positions: int[B], position of each token in its row.
      seen: bool[B, V], tokens of the prompt and of the answer so far.
    """
    penalized = (sampling.repetition_penalty != 1) | (positions < sampling.first_end)
    # A plain greedy batch, the usual case, must pay neither for penalties nor for sorting.
    logits = jax.lax.cond(
        jnp.any(penalized), _penalize, lambda logits, *_: logits, logits, sampling, positions, seen
    )
    return jax.lax.cond(
        jnp.any(sampling.temperature > 0), _draw, _greedy, logits, sampling, positions
    )


def _penalize(logits, sampling: Sampling, positions, seen):
    """Makes seen tokens less likely, and ends impossible before their first position."""
    penalty = sampling.repetition_penalty[:, None]
    logits = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    return forbid_ends(logits, sampling, positions)


def forbid_ends(logits: jax.Array, sampling: Sampling, positions: jax.Array) -> jax.Array:
    """Logits [B, V] in which tokens that end an answer are impossible before `first_end`."""
    early = (positions < sampling.first_end)[:, None]
    vocabulary = logits.shape[1]
    # A negative index would count from the end; one past the end is dropped.
    ends = jnp.where(early & (sampling.stop_ids >= 0), sampling.stop_ids, vocabulary)
    return logits.at[jnp.arange(len(logits))[:, None], ends].set(-jnp.inf, mode="drop")


def _greedy(logits, sampling, positions):
    """The first of the likeliest tokens; two reductions, on CPU seven times as fast as argmax."""
    del sampling, positions
    likeliest = logits == jnp.max(logits, axis=-1, keepdims=True)
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    return jnp.min(jnp.where(likeliest, ids, logits.shape[1] - 1), axis=-1)


def _draw(logits, sampling: Sampling, positions):
    hot = sampling.temperature > 0
    scaled = logits / jnp.where(hot, sampling.temperature, 1.0)[:, None]
    kept = keep_likely(scaled, sampling.top_k, sampling.top_p, sampling.min_p)
    keys = jax.vmap(lambda seed, at: jax.random.fold_in(jax.random.key(seed), at))(
        sampling.seed, positions
    )
    drawn = jax.vmap(jax.random.categorical)(keys, kept).astype(jnp.int32)
    return jnp.where(hot, drawn, _greedy(logits, sampling, positions))


def keep_likely(logits: jax.Array, top_k: jax.Array, top_p: jax.Array, min_p: jax.Array):
    """Logits [B, V] with all but the tokens that may be drawn at -inf; limits [B].

    In vLLM's order: at least `min_p` of the likeliest token's probability
    (https://arxiv.org/abs/2407.01082), then the `top_k` likeliest, then the smallest set of them
    that reaches `top_p` (https://arxiv.org/abs/1904.09751). Ties with the last token are kept.
    """
    ranked = jnp.sort(logits, axis=-1, descending=True)
    rank = jnp.arange(logits.shape[-1])
    inside = ranked >= ranked[:, :1] + jnp.log(min_p)[:, None]
    inside &= (rank < top_k[:, None]) | (top_k[:, None] <= 0)
    probability = jax.nn.softmax(jnp.where(inside, ranked, -jnp.inf), axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    # The likeliest token is kept even if top_p is too small for float32.
    inside &= (before < top_p[:, None]) | (top_p[:, None] >= 1) | (rank == 0)
    threshold = jnp.min(jnp.where(inside, ranked, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= threshold, logits, -jnp.inf)


@flax.struct.dataclass
class Logprobs:
    """Log probabilities at some positions: of the token there, and of the likeliest tokens.

    Attributes:
      chosen: float32[...].
      top_ids, top: int32 and float32 [..., MAX_LOGPROBS], likeliest first.
    """

    chosen: jax.Array
    top_ids: jax.Array
    top: jax.Array

    @classmethod
    def zeros(cls, *shape: int) -> "Logprobs":
        wide = (*shape, MAX_LOGPROBS)
        return cls(jnp.zeros(shape), jnp.zeros(wide, jnp.int32), jnp.zeros(wide))


def logprobs_of(logits: jax.Array, tokens: jax.Array) -> Logprobs:
    """Of tokens int[B] under logits float32[B, V]."""
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    chosen = jnp.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]
    count = min(MAX_LOGPROBS, logits.shape[-1])
    top, ids = jax.lax.top_k(logprobs, count)
    pad = ((0, 0), (0, MAX_LOGPROBS - count))
    return Logprobs(chosen, jnp.pad(ids, pad), jnp.pad(top, pad, constant_values=-jnp.inf))


def wanted_logprobs(logits: jax.Array, tokens: jax.Array, sampling: Sampling) -> Logprobs:
    """Of the chosen tokens; zeros if no row wants any, since ranking a vocabulary is slow."""
    return jax.lax.cond(
        jnp.any(sampling.logprobs),
        lambda: logprobs_of(logits, jnp.maximum(tokens, 0)),
        lambda: Logprobs.zeros(len(tokens)),
    )
