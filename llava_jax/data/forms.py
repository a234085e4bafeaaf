"""The forms that conversations have in files of different programs -> turns as LLaVA has them.

    conversations  [{"from": "human", "value": "<image>\\nWhat?"}, {"from": "gpt", "value": "Cat"}]
    messages       [{"role": "user", "content": "<image>\\nWhat?"}, ...]
                   [{"role": "user", "content": [{"type": "image"}, {"type": "text", ...}]}, ...]
    texts          [{"user": "What?", "assistant": "Cat"}]
    question, answer

A form is recognised by the key and by the keys of the first turn, so that `conversations` may hold
turns of role and content too. `<image>` in a text is a mark for a picture unless pictures are parts
of the messages: then text is text. Questions of the last two forms have no marks as a rule, and the
pictures stand before the first of them.
"""

import json
from collections.abc import Mapping
from typing import NamedTuple

from llava_jax.errors import LlavaError, RecordError, brief, closest
from llava_jax.text.conversation import (
    IMAGE_PARTS,
    IMAGE_TOKEN,
    MARKS,
    ROLE_NAMES,
    SYSTEM_ROLES,
    TEXT_PARTS,
    VIDEO_PARTS,
    Turn,
    spelled_out,
)

LISTS = ("conversations", "messages", "texts")  # keys of lists of turns
QUESTION, ANSWER = "question", "answer"
# What `config.data.columns` may name.
COLUMNS = ("id", "image", "video", "system", "conversations", QUESTION, ANSWER)
COLUMNS += ("pair", "prompt", "chosen", "rejected")  # see `data.pairs`
TALK = ("conversations", QUESTION, ANSWER)
# A turn: who speaks, what is said. Of the last pair it is the question and the answer.
TURN_KEYS = (("from", "value"), ("role", "content"), ("user", "assistant"))
# Where a part of a message has its picture or video; without any it is the record's next one.
_PART_KEYS = {"image": ("image", "image_url", "url", "path", "base64"),
              "video": ("video", "video_url", "url", "path")}  # fmt: skip
_NOTHING = (None, {"bytes": None, "path": None}, {"url": None})


class Part(NamedTuple):
    """A picture or video among the parts of a message.

    kind: image or video. given: its path, address or bytes, its number among the record's images,
    or None for the next of them.
    """

    kind: str
    given: str | bytes | int | None


class Talk(NamedTuple):
    """What a record says.

    parts: of each `<image>` in the turns, where pictures are parts of messages; None where the
    texts have marks. is_marked: False where the pictures may have no marks, and come first. keys:
    the record's that were read. ignored: keys of turns that hold something which nothing reads.
    """

    system: str | None
    turns: tuple[Turn, ...]
    parts: tuple[Part, ...] | None
    is_marked: bool
    keys: tuple[str, ...]
    ignored: tuple[str, ...]


def check_columns(columns: dict[str, str]) -> dict[str, str]:
    """`config.data.columns`: our name of a key -> the file's; LlavaError for anything else."""
    if not isinstance(columns, Mapping):
        raise LlavaError(
            f"config.data.columns is {brief(columns)}: give our name of each key and that of the "
            "data, as in {'answer': 'label'}"
        )
    for ours, theirs in columns.items():
        if ours not in COLUMNS:
            raise LlavaError(
                f"config.data.columns names {ours!r}, which is none of: {', '.join(COLUMNS)}"
            )
        if not isinstance(theirs, str) or not theirs:
            raise LlavaError(f"config.data.columns.{ours} is {theirs!r}: name a key of the data")
    if "conversations" in columns and columns.keys() & {QUESTION, ANSWER}:
        raise LlavaError(
            "config.data.columns names conversations as well as a question or answer: name one "
            "of the two"
        )
    return dict(columns)


def renamed(item: dict, columns: dict[str, str]) -> dict:
    """A record with our names in place of those of `columns`."""
    if not columns:
        return item
    taken = {*columns, *columns.values()}
    kept = {key: value for key, value in item.items() if key not in taken}
    return kept | {ours: item[theirs] for ours, theirs in columns.items() if theirs in item}


def talk_key(item: dict, columns: dict[str, str], where: str) -> str | None:
    """The key of the record's list of turns; ANSWER of a question and answer; None of neither."""
    if "conversations" in columns:
        return "conversations" if item.get("conversations") is not None else None
    if columns.keys() & {QUESTION, ANSWER}:
        has_question = item.get(QUESTION) or QUESTION not in columns
        return ANSWER if has_question and item.get(ANSWER) else None
    given = [key for key in LISTS if item.get(key)]
    if len(given) > 1:
        raise RecordError(
            "two conversations",
            f"{where} has {' and '.join(map(repr, given))}: name the one to read, as in "
            f"config.data.columns=\"{{'conversations': {given[-1]!r}}}\"",
        )
    if given:
        return given[0]
    if item.get(QUESTION) and item.get(ANSWER):
        return ANSWER
    return next((key for key in LISTS if item.get(key) is not None), None)


def talk_form(item, columns: dict[str, str]) -> str | None:
    """Words for the form of a record, by its keys and its first turn."""
    item = renamed(item, columns) if isinstance(item, dict) else {}
    try:
        key = talk_key(item, columns, "")
        if key == ANSWER:
            named = columns.get(ANSWER, ANSWER)
            return "question and answer" if item.get(QUESTION) else f"{named} as captions"
        turns = listed(item.get(key)) if key else None
        pair = turn_keys(turns[0])
        if pair == TURN_KEYS[2] and not any(turn["user"] for turn in turns):
            return "captions"
        parts = " parts" if any(isinstance(turn.get(pair[1]), list) for turn in turns) else ""
        return f"{columns.get(key, key)} of {pair[0]} and {pair[1]}{parts}"
    except (RecordError, TypeError, KeyError, IndexError, AttributeError):
        return None


def read_talk(item: dict, columns: dict[str, str], where: str) -> Talk:
    """The turns of a record with our names, LLaVA's roles and `<image>` for each picture.

    Raises:
      RecordError: it has no conversation, or one of another form.
    """
    key = talk_key(item, columns, where)
    if key == ANSWER:
        question, answer = (item.get(name) for name in (QUESTION, ANSWER))
        texts = sound_text(question or "", QUESTION, where), sound_text(answer, ANSWER, where)
        turns = (Turn("human", texts[0]), Turn("gpt", texts[1]))
        return Talk(None, turns, None, False, (QUESTION, ANSWER), ())
    if key is None:
        raise _no_talk(item, columns, where)
    messages = listed(item[key])
    if not isinstance(messages, list) or not messages:
        raise RecordError(
            "no conversations",
            f"{where}: {key!r} must be a list of turns, not {brief(item[key])}",
        )
    pair, system, said, parts, ignored = None, None, [], [], set()
    for position, message in enumerate(messages):
        here = f"{where}, turn {position}"
        pair = pair or turn_keys(message)
        if pair is None or not isinstance(message, dict) or not message.keys() >= {*pair}:
            wanted = " and ".join(map(repr, pair or TURN_KEYS[key == "messages"]))
            raise RecordError(
                "bad turn", f"{here}: expected an object with {wanted}, found {brief(message)}"
            )
        if len(message) > 2:
            ignored |= {name for name in message.keys() - {*pair} if message[name] is not None}
        if pair == TURN_KEYS[2]:
            ignored.discard("source")  # of The Cauldron: a name of the data
            said += [("human", [sound_text(message["user"], "user", here)])]
            said += [("gpt", [sound_text(message["assistant"], "assistant", here)])]
            continue
        if message.get("tool_calls") or message.get("function_call"):
            raise RecordError("tool call", f"{here} calls a tool, which no template has words for")
        who, pieces = message[pair[0]], _pieces(message[pair[1]], pair[1], here)
        pictures = [piece for piece in pieces if isinstance(piece, Part)]
        if isinstance(who, str) and who in SYSTEM_ROLES and position == 0:
            if pictures:
                raise RecordError(
                    "<image> in a system prompt", f"{here}: the system prompt may hold no picture"
                )
            system = "".join(pieces)
            continue
        role = ROLE_NAMES.get(who) if isinstance(who, str) else None
        if role is None:
            raise RecordError("unknown role", f"{here}: {_role_fault(who)}")
        said.append((role, pieces))
        parts += pictures
    turns = tuple(Turn(role, _joined(pieces, bool(parts))) for role, pieces in said)
    ignored = tuple(f"{key}.{name}" for name in sorted(map(str, ignored)))
    return Talk(system, turns, tuple(parts) or None, pair != TURN_KEYS[2], (key,), ignored)


def with_marks(turns: tuple[Turn, ...], count: int) -> tuple[Turn, ...]:
    """Turns with the marks of so many pictures before the first question, if there are no marks."""
    if not count or any(MARKS.search(turn.text) for turn in turns):
        return turns
    text = f"{IMAGE_TOKEN}\n" * count + turns[0].text
    return (Turn(turns[0].role, text if turns[0].text else text[:-1]), *turns[1:])


def sound_text(text, key: str, where: str) -> str:
    """A text that can be encoded; RecordError for another value."""
    if not isinstance(text, str):
        raise RecordError("bad text", f"{where}: {key!r} must be a string, not {brief(text)}")
    if not text.isascii() and any(0xD800 <= ord(c) < 0xE000 for c in text):
        raise RecordError("bad text", f"{where}: {key!r} holds half a surrogate pair")
    return text


def listed(turns):
    """A list of turns from JSON text, or from the lists of each key that columnar files keep."""
    if isinstance(turns, str):
        try:
            return json.loads(turns)
        except ValueError:
            return turns
    if isinstance(turns, dict) and turns and all(isinstance(v, list) for v in turns.values()):
        lengths = {len(values) for values in turns.values()}
        if len(lengths) == 1:
            columns = zip(*turns.values(), strict=True)
            return [dict(zip(turns, values, strict=True)) for values in columns]
    return turns


def turn_keys(turn) -> tuple[str, str] | None:
    keys = turn if isinstance(turn, dict) else ()
    return next((pair for pair in TURN_KEYS if {*pair} <= {*keys}), None)


def _pieces(content, key: str, where: str) -> list[str | Part]:
    """What a message holds: texts, and pictures among them."""
    if not isinstance(content, list):
        return [sound_text(content, key, where)]
    pieces = []
    for number, part in enumerate(content):
        here = f"{where}, part {number}"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in TEXT_PARTS:
            pieces.append(sound_text(part.get("text"), "text", here))
        elif kind == "image" or kind in IMAGE_PARTS:
            pieces.append(Part("image", _given(part, "image", here)))
        elif kind in VIDEO_PARTS:
            pieces.append(Part("video", _given(part, "video", here)))
        else:
            raise RecordError(
                "unknown part", f"{here} has the type {brief(kind)}: use text, image or image_url"
            )
    return pieces


def _given(part: dict, kind: str, where: str) -> str | bytes | int | None:
    key = next((key for key in _PART_KEYS[kind] if part.get(key) not in _NOTHING), None)
    if key is None:
        number = part.get("index")
        if number is not None and (not isinstance(number, int) or number < 0):
            raise RecordError(f"bad {kind} field", f"{where}: index {brief(number)} is no number")
        return number
    given = part[key]
    if isinstance(given, dict):  # {"url": ...} of OpenAI, {"bytes": ..., "path": ...} of datasets
        given = next((given[k] for k in ("url", "bytes", "path") if given.get(k) is not None), None)
    if not isinstance(given, str | bytes):
        raise RecordError(
            f"bad {kind} field",
            f"{where}: {key!r} must be a path or an address, not {brief(given)}",
        )
    if key == "base64" and isinstance(given, str) and not given.startswith("data:"):
        given = f"data:{kind}/any;base64,{given}"
    return given


def _joined(pieces: list[str | Part], is_text: bool) -> str:
    """Pieces as one text, a mark and a line break for each picture.

    is_text: what looks like a mark in the texts is none.
    """
    if not is_text:
        return "".join(pieces)
    text = lambda piece: spelled_out(piece, (IMAGE_TOKEN,))
    return "".join(
        f"{IMAGE_TOKEN}\n" if isinstance(piece, Part) else text(piece) for piece in pieces
    )


def _role_fault(role) -> str:
    if role in SYSTEM_ROLES:
        return f"only the first turn may be from {role!r}"
    return f"unknown role {brief(role)}; it must be 'human' or 'gpt', or 'user' or 'assistant'"


def _no_talk(item: dict, columns: dict[str, str], where: str) -> RecordError:
    keys = brief(", ".join(map(str, item)))
    if missing := [columns[key] for key in TALK if key in columns and not item.get(key)]:
        return RecordError(
            "no conversations",
            f"{where} has no {missing[0]!r}, which config.data.columns names; its keys: {keys}",
        )
    texts = [key for key, value in item.items() if isinstance(value, str) and key != "id"][:2]
    question, answer = texts if len(texts) == 2 else ("Q", "A")
    return RecordError(
        "no conversations",
        f"{where} has no 'conversations'; its keys: {keys}{closest(item, LISTS)}; or name a "
        f"question and an answer, as in config.data.columns="
        f"\"{{'question': {brief(question)}, 'answer': {brief(answer)}}}\"",
    )
