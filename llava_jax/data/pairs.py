"""Pairs for preference tuning: records with a better and a worse answer to a question.

    {"image": "7.jpg", "question": "What is this?", "chosen": "A cat.", "rejected": "A dog."}

In place of `question` there may be `prompt`, a text or a list of turns, or one of the forms of
`data.forms` with a question last; or a conversation whose last answer is the chosen one, without
`chosen`. Answers are texts, or lists with one turn. `pair` may hold all of this as JSON text:
RLHF-V's column `text`, with `config.data.columns={'pair': 'text'}`.

Where no pairs are wanted, these keys mean nothing: a conversation with `rejected` is one.
"""

import json

from llava_jax.data.forms import (
    ANSWER,
    LISTS,
    QUESTION,
    TURN_KEYS,
    listed,
    renamed,
    sound_text,
    talk_form,
    talk_key,
    turn_keys,
)
from llava_jax.errors import RecordError, brief
from llava_jax.text.conversation import ROLE_NAMES

PAIR_KEYS = ("pair", "prompt", "chosen", "rejected")


def is_pair(item: dict) -> bool:
    """Whether a record with our names of keys has a rejected answer."""
    return _unfolded(item).get("rejected") is not None


def unpaired(
    item: dict, columns: dict[str, str], where: str
) -> tuple[dict, str | None, tuple[str, ...]]:
    """A pair as a record with the chosen answer, the rejected one, and keys that neither is of.

    Another record as it is, None and ().

    Args:
      item: a decoded record with our names of keys.
      columns: the names that the recipe gives, which say what to read where that is not plain. Of a
        pair nothing else is left, so that `read_talk` needs them no more.

    Raises:
      RecordError: it is a pair of another form than those of this module.
    """
    item = _unfolded(item)
    if item.get("rejected") is None:
        return item, None, ()
    chosen, rejected = (_answer(item.get(key), key, where) for key in ("chosen", "rejected"))
    for key, answer in (("chosen", chosen), ("rejected", rejected)):
        if answer is not None and not answer.strip():
            raise RecordError("bad pair", f"{where}: {key!r} is empty; leave the record out")
    talk = _question(item, columns, where) if chosen else talk_key(item, columns, where)
    if chosen is None:
        plain = {talk: item[talk]} if talk in LISTS else {}
    else:
        plain = _answered(item[talk], chosen, where)
    replaced = {*PAIR_KEYS, *LISTS, *plain}
    unread = replaced - {"chosen", "rejected", talk}
    rest = {key: value for key, value in item.items() if key not in replaced}
    return rest | plain, rejected, tuple(key for key in item if key in unread and item[key])


def _answered(question, chosen: str, where: str) -> dict:
    """The keys of a record for what a pair asks, a text or turns, and its chosen answer."""
    turns = listed(question)
    if not _is_list(turns):
        return {QUESTION: question, ANSWER: chosen}
    who, said = keys = turn_keys(turns[0]) or TURN_KEYS[0]
    last = turns[-1].get(who) if isinstance(turns[-1], dict) else None
    if keys == TURN_KEYS[2] or isinstance(last, str) and ROLE_NAMES.get(last) == "gpt":
        raise RecordError(
            "bad pair", f"{where} ends with an answer and has 'chosen', another: keep one of them"
        )
    return {"messages": [*turns, {who: "gpt", said: chosen}]}


def _question(item: dict, columns: dict[str, str], where: str) -> str:
    """The key of what the chosen answer replies to."""
    named = columns.keys() & {"conversations", QUESTION, "prompt"}
    keys = [key for key in (*LISTS, QUESTION, "prompt") if not named or key in named]
    given = [key for key in keys if item.get(key)]
    if not given:
        raise RecordError(
            "bad pair",
            f"{where} has 'chosen' and 'rejected' but no question; its keys: "
            f"{brief(', '.join(map(str, item)))}",
        )
    if len(given) > 1:
        ours = "conversations" if given[-1] in LISTS else given[-1]
        raise RecordError(
            "two conversations",
            f"{where} has {' and '.join(map(repr, given))}: name the one to read, as in "
            f'config.data.columns="{{{ours!r}: {given[-1]!r}}}"',
        )
    return given[0]


def pair_form(item, columns: dict[str, str]) -> str | None:
    """`talk_form` of a record, which may be a pair."""
    try:
        plain, rejected, _ = unpaired(renamed(item, columns), columns, "")
    except (RecordError, AttributeError, TypeError):  # reported when the record is read
        return None
    if rejected is None:
        return talk_form(item, columns)
    return f"pairs of answers, {talk_form(plain, {})}"


def _is_list(turns) -> bool:
    return isinstance(turns, list) and bool(turns) and isinstance(turns[0], dict)


def _unfolded(item: dict) -> dict:
    """A record with what its `pair` holds in place of it, if that is a pair."""
    try:
        held = json.loads(item.get("pair") or "null")
    except (TypeError, ValueError):  # another program's key
        held = None
    if not isinstance(held, dict) or "rejected" not in held:
        return item
    return {key: value for key, value in item.items() if key != "pair"} | held


def _answer(value, key: str, where: str) -> str | None:
    """The text of an answer, which may be that of the only turn of a list."""
    if value is None and key == "chosen":
        return None
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        value = next((value[0][said] for _, said in TURN_KEYS[:2] if said in value[0]), value)
    if isinstance(value, list):  # of the parts of a message
        texts = [part.get("text") if isinstance(part, dict) else None for part in value]
        value = "".join(texts) if all(isinstance(text, str) for text in texts) else value
    return sound_text(value, key, where)
