"""The Jinja form of every template says what training rendered."""

import pytest
from jinja2.exceptions import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from llava_jax.text.chat_template import chat_template, template_of
from llava_jax.text.conversation import Turn
from llava_jax.text.templates import TEMPLATES, get_template, render

CONVERSATIONS = {
    "one question": ["<image>\n What's this? "],
    "the image behind": ["What's this? <image>"],
    "an image alone": ["<image>"],
    "two images": ['<image>\n<image>\n Which "is" larger?\n'],
    "no image": [" Hello"],
    "answered": ["<image>\nWhat's this?", "A dog."],
    "several turns": ["<image>\nWhat's this?", "A dog.", "Sure? ", " Yes.\n", "Bye"],
}
ROLES = ("user", "assistant")


def rendered(name: str, messages: list, generation: bool) -> str:
    jinja = chat_template(get_template(name))
    texts, _ = render_jinja_template(
        [messages], chat_template=jinja, add_generation_prompt=generation
    )
    return texts[0]


def as_messages(texts: list[str]) -> list[dict]:
    return [{"role": ROLES[i % 2], "content": text} for i, text in enumerate(texts)]


def as_items(texts: list[str]) -> list[dict]:
    """The same with content items, images ahead of the text as chat programs send them."""
    messages = []
    for i, text in enumerate(texts):
        items = [{"type": "image"}] * text.count("<image>")
        rest = text.replace("<image>\n", "").replace("<image>", "")
        messages.append({"role": ROLES[i % 2], "content": [*items, {"type": "text", "text": rest}]})
    return messages


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("texts", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_equals_the_rendering_of_training(name, texts):
    template = get_template(name)
    if template.image_only_question and (len(texts) > 2 or "<image>" not in texts[0]):
        return  # captions only
    turns = [Turn(("human", "gpt")[i % 2], text) for i, text in enumerate(texts)]
    generation = len(texts) % 2 == 1
    expected = "".join(s.text for s in render(template, turns, generation=generation))
    assert rendered(name, as_messages(texts), generation) == expected
    assert rendered(name, as_items(texts), generation) == expected


@pytest.mark.parametrize("roles", [["system", "user"], ["assistant"], ["user", "user"]])
def test_other_roles_are_refused(roles):
    messages = [{"role": role, "content": "Hi"} for role in roles]
    with pytest.raises(TemplateError, match="take turns"):
        rendered("v1", messages, True)


@pytest.mark.parametrize("name", TEMPLATES)
def test_known_again(name):
    found = template_of(chat_template(get_template(name)))
    assert get_template(found) == get_template(name)
    assert template_of("{{ messages }}") is None
