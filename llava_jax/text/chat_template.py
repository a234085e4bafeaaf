"""Conversation templates as Jinja chat templates, for transformers, vLLM and llama.cpp.

A message is `{"role": "user" | "assistant", "content": ...}`. Its content is a string, in which
`<image>` stands for a picture, or a list of `{"type": "image"}` and `{"type": "text", "text": ...}`
items; of models that take videos also `{"type": "video"}`, for `<video>`. The rendered text equals
that of `llava_jax.text.templates.render`. As in the llava-hf checkpoints it has no BOS token: the
tokenizer adds it.
"""

import json

from llava_jax.text.conversation import IMAGE_TOKEN
from llava_jax.text.templates import TEMPLATES, Template

_NEVER_TRAINED = (
    "this model was trained on user and assistant messages that take turns, user first, with a "
    "system prompt of its own"
)
_PART = (
    "        {{%- set {0}s = message['content'] | selectattr('type', 'equalto', '{0}') | list %}}\n"
)


def _text_of_a_question(kinds: tuple[str, ...]) -> str:
    """Sets `text`, in which pictures and videos stand first, kind by kind, and their `count`."""
    found = "".join(_PART.format(kind) for kind in kinds)
    marks = "".join(f"'<{kind}>\\n' * ({kind}s | length) + " for kind in kinds)
    return f"""\
    {{%- if message['content'] is string %}}
        {{%- set text = message['content'] %}}
    {{%- else %}}
{found}\
        {{%- set texts = message['content'] | selectattr('type', 'equalto', 'text') %}}
        {{%- set texts = texts | map(attribute='text') | join('') %}}
        {{%- set text = {marks}texts %}}
    {{%- endif %}}
    {{%- set count = text.split('{IMAGE_TOKEN}') | length - 1 %}}
"""


_ONLY_IMAGES = f"    {{%- set text = '{IMAGE_TOKEN}' * count %}}\n"
_LONE_IMAGE_FIRST = f"""\
    {{%- if count == 1 %}}
        {{%- set text = '{IMAGE_TOKEN}\\n' + (text | replace('{IMAGE_TOKEN}', '') | trim) %}}
        {{%- set text = text | trim %}}
    {{%- endif %}}
"""


def chat_template(template: Template, videos: bool = False) -> str:
    """The Jinja text that renders messages as the model was trained to read them.

    The renderer raises an exception for other roles and for turns out of order.

    videos: a content may hold videos too, which stand behind the pictures.
    """
    before, after = template.human
    first = template.header + before if template.first_human is None else template.first_human
    question = _text_of_a_question(("image", "video") if videos else ("image",))
    question += _ONLY_IMAGES if template.image_only_question else _LONE_IMAGE_FIRST
    answer_before, end, answer_after = template.gpt
    return (
        "{%- for message in messages %}\n"
        "{%- if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') %}\n"
        f"    {{{{- raise_exception({_quoted(_NEVER_TRAINED)}) }}}}\n"
        "{%- elif message['role'] == 'user' %}\n"
        f"{question}"
        f"    {{{{- {_quoted(first)} if loop.first else {_quoted(before)} }}}}\n"
        f"    {{{{- text + {_quoted(after)} }}}}\n"
        "{%- else %}\n"
        "    {%- if message['content'] is string %}\n"
        "        {%- set text = message['content'] %}\n"
        "    {%- else %}\n"
        "        {%- set text = message['content'] | map(attribute='text') | join('') %}\n"
        "    {%- endif %}\n"
        f"    {{{{- {_quoted(answer_before)} + text + {_quoted(end + answer_after)} }}}}\n"
        "{%- endif %}\n"
        "{%- endfor %}\n"
        f"{{{{- {_quoted(answer_before.rstrip(' '))} if add_generation_prompt else "
        f"{_quoted(template.footer)} }}}}"
    )


def template_of(jinja: str) -> str | None:
    """The name of the template that `chat_template` wrote as this text, or None."""
    for name, template in TEMPLATES.items():
        if jinja in (chat_template(template), chat_template(template, videos=True)):
            return name
    return None


def _quoted(text: str) -> str:
    """A Jinja string literal."""
    return json.dumps(text, ensure_ascii=False)
