"""Prompt look-up: a pass of the decoder also reads guesses, and those that come true are kept.

Where an answer repeats its prompt or itself, as a transcript, a correction or a summary does, what
followed the same tokens before follows again (https://github.com/apoorvumang/prompt-lookup-decoding,
a form of https://arxiv.org/abs/2211.17192 without a second model). A pass with a few tokens a row
takes hardly longer than one with one token where reading the weights takes the time.

Every token is chosen from its logits as without guesses: by the same function, with the random
number of its position. So answers are those without guesses, drawn ones too.

B rows of the state, C cache slots that are looked at, K guesses of a row, T = 1 + K tokens that a
pass reads of it, W tokens that it gets from a call at most, V vocabulary.
"""

import flax
import jax
import jax.numpy as jnp

from llava_jax.errors import LlavaError
from llava_jax.inference.contrast import Contrast
from llava_jax.inference.decoding import (
    NO_TOKEN,
    TOKENS_PER_CALL,
    DecodeState,
    advance,
    read_on,
)
from llava_jax.inference.sampling import Logprobs
from llava_jax.models.cache import PAGE
from llava_jax.models.llava import LlavaModel

MOST_GUESSES = 16
SHORTEST, LONGEST = 2, 3  # runs of tokens that are looked up


def check_lookup(count) -> None:
    """Raises LlavaError unless so many tokens can be guessed at a time."""
    if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= MOST_GUESSES:
        raise LlavaError(
            f"lookup must be a whole number from 0, which is off, to {MOST_GUESSES}, not {count!r}"
        )


def guess(history: jax.Array, lengths: jax.Array, count: int) -> jax.Array:
    """The tokens int32[B, K] that may follow the latest of each row; NO_TOKEN where none is known.

    They are those that followed the last three tokens of the row where these stood before, the last
    time that they did; or else the last two. Example with K = 4, where # is of a picture:

        history   # # t h e _ c a t . # t h e _ d o g . _ t h e
        found         ^ ^ ^               ^ ^ ^             . .    the latest is e, at 22
        guesses                                 _ d o g

    If they end at the row's end, it goes on in turn: of `a b a b` the guesses are a b a b.

    Args:
      history: int32[B, C], of which row r has the first lengths[r] + 1; ids below 0 are found
        nowhere, and end the guesses.
      lengths: int32[B], position of each row's latest token.
      count: K.
    """
    width, alike, matched = history.shape[1], True, 0
    for back in range(LONGEST):
        before = jnp.pad(history, ((0, 0), (back, 0)), constant_values=NO_TOKEN)[:, :width]
        last = jnp.take_along_axis(before, lengths[:, None], axis=1)  # [B, 1]
        alike &= (before == last) & (last >= 0)
        matched += alike  # [B, C]: of the row's last tokens, so many end here too
    places = jnp.arange(width)
    known = (places < lengths[:, None]) & (matched >= SHORTEST)
    # The longest, and of several the latest, as one number: argmax is slow on CPU.
    best = jnp.max(jnp.where(known, matched * width + places, -1), axis=1)
    end = jnp.where(best >= 0, best % width, lengths - 1)
    following = end[:, None] + 1 + jnp.arange(count) % (lengths - end)[:, None]
    guesses = jnp.take_along_axis(history, following, axis=1)
    good = (best >= 0)[:, None] & (guesses >= 0)
    return jnp.where(jax.lax.cummin(good.astype(jnp.int32), axis=1) > 0, guesses, NO_TOKEN)


@flax.struct.dataclass
class Drafts:
    """What became of the guesses of a call.

    Attributes:
      made: int32[B], passes with a guess.
      tokens: int32[B], guesses that were read; `accepted` of them came true.
    """

    made: jax.Array
    tokens: jax.Array
    accepted: jax.Array


@flax.struct.dataclass
class _Said:
    """What a call gives: int32[B] `counts` of tokens int32[B, W] and of their log probabilities."""

    tokens: jax.Array
    logprobs: Logprobs
    counts: jax.Array
    drafts: Drafts

    @classmethod
    def nothing(cls, rows: int, most: int) -> "_Said":
        zeros = jnp.zeros(rows, jnp.int32)
        tokens = jnp.full((rows, most), NO_TOKEN, jnp.int32)
        return cls(tokens, Logprobs.zeros(rows, most), zeros, Drafts(zeros, zeros, zeros))

    def add(self, going: jax.Array, tokens: jax.Array, logprobs: Logprobs) -> "_Said":
        """With one more token of the rows that are going."""
        places = jnp.arange(going.size), jnp.where(going, self.counts, self.tokens.shape[1])
        put = lambda all, one: all.at[places].set(one, mode="drop")
        return self.replace(
            tokens=put(self.tokens, tokens),
            logprobs=jax.tree.map(put, self.logprobs, logprobs),
            counts=self.counts + going,
        )


def decode_drafts(
    model: LlavaModel,
    params: dict,
    state: DecodeState,
    running: jax.Array,
    fewest: jax.Array,
    tables: jax.Array,
    contrast: Contrast | None = None,
    *,
    count: int,
) -> tuple[jax.Array, Logprobs, Drafts, DecodeState]:
    """`decode` in as many passes, each of which gives a row from one token to 1 + K.

    Args:
      count: K; other arguments as in `decode`.

    Returns:
      Tokens int32[B, W] with NO_TOKEN after a row's last, their logprobs, what became of the
      guesses, and the state.
    """
    state = state.replace(budget=jnp.where(running, state.budget, 0))
    said = _Said.nothing(len(state.tokens), TOKENS_PER_CALL * (1 + count))

    def unfinished(carry):
        number, state, _ = carry
        return (number < TOKENS_PER_CALL) & (jnp.sum(state.budget > 0) >= fewest)

    def one_pass(carry):
        number, state, said = carry
        return number + 1, *_one_pass(model, params, state, said, tables, contrast, count)

    _, state, said = jax.lax.while_loop(unfinished, one_pass, (0, state, said))
    return said.tokens, said.logprobs, said.drafts, state


def _one_pass(model, params, state: DecodeState, said: _Said, tables, contrast, count: int):
    """Reads each row's latest token and its guesses, and keeps what comes true of them."""
    active = state.budget > 0
    seen = state.history[:, : tables.shape[1] * PAGE]
    guesses = guess(seen, state.lengths, count)
    if contrast is not None:  # both rows of a pair read the same
        guesses = guesses[contrast.leaders]
    # The last token of an answer is never read.
    guesses = jnp.where(jnp.arange(count) < state.budget[:, None] - 1, guesses, NO_TOKEN)
    tokens = jnp.concatenate([state.tokens[:, None], jnp.maximum(guesses, 0)], axis=1)  # [B, T]
    wanted = jnp.concatenate([active[:, None], guesses >= 0], axis=1)
    # What a guess that fails leaves in the cache is behind the row's length, where nothing looks
    # before the next pass writes there.
    logits, state = read_on(model, params, state, tokens, wanted, tables)
    cache, history = state.cache, state.history
    expected = jnp.pad(guesses, ((0, 0), (0, 1)), constant_values=NO_TOKEN)  # nothing at the last

    def some_go_on(carry):
        _, going, *_ = carry
        return jnp.any(going)

    def one_token(carry):
        place, going, state, said = carry
        new, logprobs = advance(state, logits[:, place], going, contrast)
        keep = lambda new, old: jnp.where(going.reshape(-1, *[1] * (old.ndim - 1)), new, old)
        at = jnp.arange(going.size), jnp.where(going, new.lengths, history.shape[1])
        state = state.replace(
            lengths=new.lengths,
            tokens=keep(new.tokens, state.tokens),
            budget=keep(new.budget, state.budget),
            seen=keep(new.seen, state.seen),
            history=state.history.at[at].set(new.tokens, mode="drop"),
        )
        said = said.add(going, state.tokens, logprobs)
        going &= (state.budget > 0) & (state.tokens == expected[:, place])
        return place + 1, going, state, said

    before = said.counts
    carry = (0, active, state.replace(cache=None), said)
    _, _, state, said = jax.lax.while_loop(some_go_on, one_token, carry)
    drafts = Drafts(
        said.drafts.made + (guesses[:, 0] >= 0),
        said.drafts.tokens + jnp.sum(guesses >= 0, axis=1),
        said.drafts.accepted + jnp.maximum(said.counts - before - 1, 0),
    )
    return state.replace(cache=cache), said.replace(drafts=drafts)
