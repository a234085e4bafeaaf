"""Messages in OpenAI's form: pictures by position, text as data, faults by field."""

import pytest

from llava_jax.serving.api import ApiError, Limits
from llava_jax.serving.messages import read_messages, read_prompt
from llava_jax.text.conversation import BREAK, Turn

LIMITS = Limits()
PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def user(*content) -> dict:
    return {"role": "user", "content": content[0] if len(content) == 1 else list(content)}


def refusal(messages, limits=LIMITS) -> ApiError:
    with pytest.raises(ApiError) as caught:
        read_messages(messages, limits)
    return caught.value


def test_pictures_stand_where_they_were_sent():
    found = read_messages([user(text("a"), PICTURE, text("b"), PICTURE, text("c"))], LIMITS)
    assert found.turns == (Turn("human", "a<image>\nb<image>\nc"),)
    assert len(found.images) == 2
    assert found.names[1] == "messages[0].content[3].image_url"


def test_a_typed_mark_makes_no_picture():
    (turn,) = read_messages([user("look: <image>")], LIMITS).turns
    assert "<image>" not in turn.text and turn.text.replace(BREAK, "") == "look: <image>"


def test_system_messages_become_one_prompt():
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "developer", "content": [text("Be brief.")]},
        user("hi"),
        {"role": "assistant", "content": "hello"},
        user("and?"),
    ]
    found = read_messages(messages, LIMITS)
    assert found.system == "Be kind.\nBe brief."
    assert [turn.role for turn in found.turns] == ["human", "gpt", "human"]


def test_messages_of_one_role_become_one_turn():
    found = read_messages([user("a"), user(PICTURE, text("b"))], LIMITS)
    assert found.turns == (Turn("human", "a\n<image>\nb"),)


def test_an_image_url_may_be_a_bare_text():
    found = read_messages(
        [user({"type": "input_image", "image_url": "data:x"}, text("b"))], Limits()
    )
    assert found.images == ("data:x",)


@pytest.mark.parametrize(
    "messages, param",
    [
        (None, "messages"),
        ([], "messages"),
        ("hi", "messages"),
        (["hi"], "messages[0]"),
        ([{"role": "tool", "content": "a"}], "messages[0].role"),
        ([{"content": "a"}], "messages[0].role"),
        ([user(None)], "messages[0].content"),
        ([user(3)], "messages[0].content"),
        ([user([{"type": "video_url"}])], "messages[0].content[0].type"),
        ([user(["a"])], "messages[0].content[0].type"),
        ([user([text(3)])], "messages[0].content[0].text"),
        ([user("\ud800")], "messages[0].content"),
        ([user(BREAK)], "messages[0].content"),
        ([user([{"type": "image_url", "image_url": {}}])], "messages[0].content[0].image_url.url"),
        ([user([{"type": "image_url", "image_url": 3}])], "messages[0].content[0].image_url"),
        ([{"role": "assistant", "content": "a"}, user("b")], "messages"),
        ([user("a"), {"role": "assistant", "content": "b"}], "messages"),
        ([{"role": "system", "content": [PICTURE]}, user("a")], "messages[0].content[0].type"),
        (
            [user("a"), {"role": "assistant", "content": None, "tool_calls": [1]}, user("b")],
            "messages[1]",
        ),
    ],
)
def test_a_fault_names_its_field(messages, param):
    error = refusal(messages)
    assert (error.status, error.param) == (400, param)


def test_instructions_without_a_question_are_the_question():
    found = read_messages([{"role": "developer", "content": "say a"}], LIMITS)
    assert found.system is None and found.turns == (Turn("human", "say a"),)


def test_everything_is_counted_before_anything_is_read():
    assert refusal([user([PICTURE] * 9)]).param == "messages"
    assert refusal([user([text("a")] * 1025)]).param == "messages"
    assert refusal([user("a")] * 257).param == "messages"


def test_the_prompt_of_a_text_completion_is_one_text():
    assert read_prompt(["a"], LIMITS).turns == (Turn("human", "a"),)
    for wrong in (None, 3, ["a", "b"], [1, 2]):
        with pytest.raises(ApiError):
            read_prompt(wrong, LIMITS)
