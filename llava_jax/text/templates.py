"""Conversation templates: turns -> text segments that know whether they are learnt.

The wording and the separators are those of LLaVA (https://github.com/haotian-liu/LLaVA,
llava/conversation.py and the preprocess functions of llava/train/train.py) to the letter: `</s>`
stands literally in the text, whatever the tokenizer. `chatml` and `llama_3` follow the chat
templates of SmolLM2/Qwen and of Llama 3. No template writes the BOS token; the tokenizer adds it.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from llava_jax.errors import LlavaError, RecordError
from llava_jax.text.conversation import IMAGE_TOKEN, Turn

_CHAT_OF = (
    "A chat between a curious {0} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {0}'s questions."
)
_LANGUAGE_AND_VISION = (
    "You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)


@dataclass(frozen=True)
class Segment:
    """A piece of the rendered text with one owner.

    supervised: its tokens carry a loss.
    leading_supervised_tokens: of an unsupervised segment, how many first tokens do all the same.
    """

    text: str
    supervised: bool = False
    leading_supervised_tokens: int = 0


@dataclass(frozen=True)
class Template:
    """How a conversation is written.

    header, human = (before, after) a question, gpt = (before, end, after) an answer: the text is
    header, then for each turn before + text + end/after, then footer. The answer and its `end`
    are supervised, the rest is not. `first_human`, where given, replaces header and the text
    before the first question. `stop` ends a generated answer.
    """

    name: str
    human: tuple[str, str]
    gpt: tuple[str, str, str]
    stop: tuple[str, ...]
    header: str = ""
    first_human: str | None = None
    footer: str = ""
    # v0 teaches the role texts and the "###" that follows an answer.
    supervise_gpt_role: bool = False
    supervise_footer: bool = False
    human_leading_supervised_tokens: int = 0
    # plain writes captions: one question, of which only the image is kept.
    image_only_question: bool = False


def _vicuna(name: str, person: str) -> Template:
    return Template(
        name=name,
        header=_CHAT_OF.format(person) + " ",
        human=("USER: ", " "),
        gpt=("ASSISTANT: ", "</s>", ""),
        stop=("</s>",),
    )


def _chatml(name: str, system: str, newline: str) -> Template:
    return Template(
        name=name,
        header=f"<|im_start|>system\n{system}<|im_end|>{newline}",
        human=("<|im_start|>user\n", f"<|im_end|>{newline}"),
        gpt=("<|im_start|>assistant\n", "<|im_end|>", newline),
        stop=("<|im_end|>",),
    )


_PLAIN = Template(
    name="plain",
    human=("", ""),
    gpt=("", "\n", ""),
    stop=("\n",),
    image_only_question=True,
)

_ALL = (
    _PLAIN,
    # For decoders whose tokenizer adds no BOS and whose chats begin with this token. SmolLM2's
    # largest activations hang on the first token: where that is an image's, rounding to bfloat16
    # changes the gradient by more than its own size.
    dataclasses.replace(_PLAIN, name="plain_chatml", header="<|im_start|>"),
    Template(
        name="v0",
        header=_CHAT_OF.format("human") + "\n\n",
        human=("### Human: ", "\n"),
        gpt=("### Assistant: ", "\n", ""),
        footer="### ",
        stop=("###",),
        supervise_gpt_role=True,
        supervise_footer=True,
        human_leading_supervised_tokens=2,
    ),
    _vicuna("v1", "user"),
    _vicuna("llava_v1", "human"),
    Template(
        name="llama_2",
        first_human=f"[INST] <<SYS>>\n{_LANGUAGE_AND_VISION}\n<</SYS>>\n\n",
        human=("<s>[INST] ", " [/INST]"),
        gpt=(" ", " </s>", ""),
        stop=("</s>",),
    ),
    Template(
        name="mistral_instruct",
        human=("[INST] ", " [/INST]"),
        gpt=(" ", " </s>", ""),
        stop=("</s>",),
    ),
    _chatml("chatml_direct", "Answer the questions.", newline=""),
    _chatml("chatml", "You are a helpful assistant.", newline="\n"),
    Template(
        name="llama_3",
        header="<|start_header_id|>system<|end_header_id|>\n\n"
        + _LANGUAGE_AND_VISION
        + "<|eot_id|>",
        human=("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
        gpt=("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>", ""),
        stop=("<|eot_id|>",),
    ),
)
TEMPLATES: dict[str, Template] = {template.name: template for template in _ALL}
# Other names of the same template, as in the original's flags.
TEMPLATES |= {
    "vicuna_v1": TEMPLATES["v1"],
    "llava_v0": TEMPLATES["v0"],
    "llava_llama_2": TEMPLATES["llama_2"],
    "mpt": TEMPLATES["chatml_direct"],
}


def get_template(name: str) -> Template:
    """The template called `name`; LlavaError listing the known names otherwise."""
    if name not in TEMPLATES:
        raise LlavaError(f"unknown template {name!r}; known: {', '.join(sorted(TEMPLATES))}")
    return TEMPLATES[name]


def place_image(text: str) -> str:
    """A lone `<image>` goes to the front of its turn; several stay where they were written."""
    if text.count(IMAGE_TOKEN) != 1:
        return text
    return f"{IMAGE_TOKEN}\n{text.replace(IMAGE_TOKEN, '').strip()}".strip()


def render(
    template: Template, turns: Sequence[Turn], generation: bool = False
) -> tuple[Segment, ...]:
    """The text of a conversation, cut into segments.

    turns: alternating, human first. With `generation`, the last is a human's and the text stops
    where its answer starts, without a trailing space: tokenizers of the Llama and GPT-2 kinds join
    a space to the word after it, so the answer's first token brings its own. The token ids of the
    prompt are then those of the whole conversation up to the answer, unless the answer itself
    begins with white space (a tokenizer may join that to what stands before it) or `llama_3` is
    used with a tokenizer of the GPT-2 kind (which cuts the two line breaks of its header by what
    follows them).
    """
    _check_order(template, turns, generation)
    if template.image_only_question:
        question = IMAGE_TOKEN * turns[0].text.count(IMAGE_TOKEN)
        turns = (Turn("human", question), *turns[1:])
    segments = [Segment(template.header)]
    for position, turn in enumerate(turns):
        if turn.role == "human":
            segments.append(_human_segment(template, turn.text, first=position == 0))
        else:
            before, end, after = template.gpt
            segments.append(Segment(before, template.supervise_gpt_role))
            segments += [Segment(turn.text + end, supervised=True), Segment(after)]
    if generation:
        segments.append(Segment(template.gpt[0].rstrip(" ")))
    else:
        segments.append(Segment(template.footer, template.supervise_footer))
    return tuple(segment for segment in segments if segment.text)


def _human_segment(template: Template, text: str, first: bool) -> Segment:
    before, after = template.human
    if first and template.first_human is not None:
        before = template.first_human
    if not template.image_only_question:
        text = place_image(text)
    return Segment(before + text + after, False, template.human_leading_supervised_tokens)


def _check_order(template: Template, turns: Sequence[Turn], generation: bool) -> None:
    if not turns:
        raise RecordError("no conversations", "a conversation needs at least one turn")
    for position, turn in enumerate(turns):
        if turn.role != ("human", "gpt")[position % 2]:
            raise RecordError("turns do not alternate", "turns must alternate, human first")
    if generation and turns[-1].role != "human":
        raise RecordError("nothing to answer", "generation needs a human turn last")
    if template.image_only_question:
        if len(turns) != (1 if generation else 2) or IMAGE_TOKEN not in turns[0].text:
            raise RecordError(
                "not a caption",
                f"the template {template.name!r} takes captions: one human turn with <image> and "
                "one answer",
            )
