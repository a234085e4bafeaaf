"""Chat messages in OpenAI's form -> a system prompt, turns, and the pictures among them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llava_jax.serving.api import ApiError, Limits, shortened
from llava_jax.text.conversation import (
    BREAK,
    IMAGE_PARTS,
    IMAGE_TOKEN,
    SYSTEM_ROLES,
    TEXT_PARTS,
    Turn,
    spelled_out,
)

USER, ASSISTANT = "user", "assistant"
NO_TEXT = re.compile(f"[\ud800-\udfff{BREAK}]")  # half characters, and what spells marks out


@dataclass(frozen=True)
class Messages:
    """A conversation that waits for an answer.

    Attributes:
      system: the system prompt, or None for the template's own.
      turns: of user and assistant, in turns. `<image>` in their text stands for one picture; what
        users typed is spelled out, so that it can neither make a picture nor end a turn.
      images: the address of each picture, in the order of the marks.
      names: the field of each picture, for messages about it.
      continued: the text of one turn is to be continued as it is, without a template.
    """

    system: str | None
    turns: tuple[Turn, ...]
    images: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    continued: bool = False


def read_messages(messages, limits: Limits) -> Messages:
    """The `messages` of a chat completion.

    Messages of one role that follow each other become one turn, a line apart. System messages may
    stand anywhere before the first answer, and become one system prompt; without any other message
    they are what gets answered.

    Raises:
      ApiError: naming the message and the part at fault.
    """
    if not isinstance(messages, list) or not messages:
        raise _refused("messages", "messages must be a non-empty list")
    if len(messages) > limits.messages:
        raise _refused("messages", f"messages may hold at most {limits.messages} messages")
    _check_parts(messages, limits)
    system, turns, images, names = [], [], [], []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        role = message.get("role")
        if role in SYSTEM_ROLES:
            if any(turn.role == "gpt" for turn in turns):
                raise _refused(f"{where}.role", "a system message must come before any answer")
            system.append(_text_only(message.get("content"), f"{where}.content"))
            continue
        if role not in (USER, ASSISTANT):
            raise _refused(f"{where}.role", f"the role {shortened(role)} is not supported")
        if message.get("tool_calls") or message.get("function_call"):
            raise _refused(where, "tool calls are not supported")
        text = _content(message.get("content"), f"{where}.content", role, images, names)
        ours = "human" if role == USER else "gpt"
        if turns and turns[-1].role == ours:
            text = f"{turns.pop().text}\n{text}"
        turns.append(Turn(ours, text))
    prompt = "\n".join(text for text in system if text)
    if prompt and not turns:
        return Messages(None, (Turn("human", prompt),))
    if not turns or turns[0].role != "human":
        raise _refused("messages", "the first message after the system prompt must be a user's")
    if turns[-1].role != "human":
        raise _refused("messages", "the last message must be a user's: it is what gets answered")
    return Messages(prompt or None, tuple(turns), tuple(images), tuple(names))


def read_answered(messages, limits: Limits) -> tuple[Messages, str]:
    """Messages whose last one is an assistant's: what it answers, and its text.

    Raises:
      ApiError: as `read_messages`.
    """
    answer = messages[-1] if isinstance(messages, list) and messages else None
    if not isinstance(answer, Mapping) or answer.get("role") != ASSISTANT:
        raise _refused("messages", "the last message must be an assistant's: it is explained")
    _check_parts(messages, limits)
    where = f"messages[{len(messages) - 1}].content"
    text = _content(answer.get("content"), where, ASSISTANT, [], [])
    return read_messages(messages[:-1], limits), text


def read_prompt(prompt, limits: Limits) -> Messages:
    """The `prompt` of a text completion: one text."""
    if isinstance(prompt, list) and len(prompt) == 1:
        (prompt,) = prompt
    if not isinstance(prompt, str):
        raise _refused("prompt", "prompt must be one text: send a request for each of several")
    check_length(len(prompt), limits, "prompt")
    return Messages(None, (Turn("human", _typed(prompt, "prompt")),), continued=True)


def _check_parts(messages: Sequence, limits: Limits) -> None:
    """Counts everything before any of it is read."""
    parts = images = characters = 0
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise _refused(f"messages[{i}]", f"messages[{i}] must be an object")
        content = message.get("content")
        if isinstance(content, list):
            parts += len(content)
            if parts > limits.parts:
                raise _refused("messages", f"a request may hold at most {limits.parts} parts")
            objects = [part for part in content if isinstance(part, Mapping)]
            images += sum(part.get("type") in IMAGE_PARTS for part in objects)
            characters += sum(_length(part.get("text")) for part in objects)
        characters += _length(content)
    check_length(characters, limits, "messages")
    if images > limits.images:
        raise _refused("messages", f"a request may hold {limits.images} pictures, not {images}")


def _length(text) -> int:
    return len(text) if isinstance(text, str) else 0


def check_length(characters: int, limits: Limits, where: str) -> None:
    """Refuses texts that no context holds before they are read."""
    if characters > limits.characters:
        message = f"{where} may hold at most {limits.characters:,} characters"
        raise ApiError(400, message, where, "context_length_exceeded")


def _content(content, where: str, role: str, images: list[str], names: list[str]) -> str:
    """One message's text, with a mark for each picture; adds the pictures to `images`."""
    if content is None and role == ASSISTANT:
        return ""
    if isinstance(content, str):
        return _typed(content, where)
    if not isinstance(content, list):
        raise _refused(where, f"{where} must be a text or a list of parts")
    text = ""
    for j, part in enumerate(content):
        here = f"{where}[{j}]"
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind in TEXT_PARTS:
            text += _typed(part.get("text"), f"{here}.text")
        elif kind in IMAGE_PARTS and role == USER:
            images.append(_address(part.get("image_url"), f"{here}.image_url"))
            names.append(f"{here}.image_url")
            text += f"{IMAGE_TOKEN}\n"
        elif kind == "refusal" and role == ASSISTANT:
            continue
        else:
            raise _refused(f"{here}.type", f"{here} has the unsupported type {shortened(kind)}")
    return text


def _text_only(content, where: str) -> str:
    return _content(content, where, "system", [], [])


def _typed(text, where: str) -> str:
    """A user's text as data."""
    if not isinstance(text, str):
        raise _refused(where, f"{where} must be a text, not {shortened(text)}")
    if NO_TEXT.search(text):
        raise _refused(where, f"{where} holds a character that no text may hold")
    return spelled_out(text, (IMAGE_TOKEN,))


def _address(value, where: str) -> str:
    if isinstance(value, Mapping):
        value, where = value.get("url"), f"{where}.url"
    if not isinstance(value, str) or not value:
        raise _refused(where, f"{where} must be an address such as data:image/png;base64,...")
    return value


def _refused(param: str, message: str) -> ApiError:
    return ApiError(400, message, param, "invalid_value")
