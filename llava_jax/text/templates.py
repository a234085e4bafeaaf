"""Conversation templates: turns -> text segments that know whether they are learnt.

The wording and the separators are those of LLaVA (https://github.com/haotian-liu/LLaVA,
llava/conversation.py and the preprocess functions of llava/train/train.py) to the letter: `</s>`
stands literally in the text, whatever the tokenizer. `chatml`, `llama_3`, `phi_3` and
`seed_oss` follow the chat templates of SmolLM2/Qwen, Llama 3, Phi-3 and Seed-OSS-36B-Instruct. No
template writes the BOS token; the tokenizer adds it.
"""

import dataclasses
import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from llava_jax.errors import LlavaError, RecordError
from llava_jax.text.conversation import IMAGE_TOKEN, Turn, images_in

TURNS = ("conversation", "independent")
PAIR = "pair"  # of a record with two answers to a prompt
_LEADING_IMAGES = re.compile(rf"^(?:{IMAGE_TOKEN}\s*|[^\n:]*: *{IMAGE_TOKEN} *\n\s*)*")
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
    leading_supervised_tokens: the number of first tokens of an unsupervised segment that carry one
    all the same.
    learnt_tokens: of an unsupervised segment, tokens that carry one wherever they stand in it.
    """

    text: str
    supervised: bool = False
    leading_supervised_tokens: int = 0
    learnt_tokens: tuple[str, ...] = ()


@dataclass(frozen=True)
class Template:
    r"""How a conversation is written.

    Two rounds in the template `v1`, and below each character what it belongs to: h header, 0 and 1
    the two parts of `human`, g the first part of `gpt`, ^ an answer and the second part of `gpt`,
    which are supervised.

        A chat ... USER: <image>\nWhat? ASSISTANT: A cat.</s>USER: Where? ASSISTANT: On a sofa.</s>
        hhhhhhhhhhh000000              1ggggggggggg^^^^^^^^^^000000      1ggggggggggg^^^^^^^^^^^^^^

    Attributes:
      header: the text before the first turn, with the default system prompt if there is one.
      human: (before, after) a question.
      gpt: (before, end, after) an answer.
      stop: texts that end a generated answer.
      first_human: replaces header and the text before the first question.
      footer: the text after the last turn.
      system: (before, after) a system prompt at the very beginning; None if the template has no
        place for one.
    """

    name: str
    human: tuple[str, str]
    gpt: tuple[str, str, str]
    stop: tuple[str, ...]
    header: str = ""
    first_human: str | None = None
    footer: str = ""
    # v0 supervises the role texts and the "###" after an answer too.
    supervise_gpt_role: bool = False
    supervise_footer: bool = False
    human_leading_supervised_tokens: int = 0
    # plain writes captions: one question, of which only the images are kept.
    image_only_question: bool = False
    # Not in `repr`, from which the names of cached lengths are made.
    system: tuple[str, str] | None = dataclasses.field(default=None, repr=False)
    # Of `with_original_labels`: learnt in system prompt and questions, and all after an answer.
    learnt_tokens: tuple[str, ...] = dataclasses.field(default=(), repr=False)

    def with_original_labels(self) -> "Template":
        """The template with the labels of LLaVA-NeXT's own training, `preprocess_qwen`.

        Answers are learnt with their header and what follows them, and so are the marks of turns
        and single line breaks in system prompt and questions.

        Raises:
          LlavaError: the template is none whose original labels differ.
        """
        if self.name != "chatml":
            raise LlavaError(
                f"config.data.labels is 'original', which is for the template 'chatml' and not for "
                f"{self.name!r}: leave it out"
            )
        return dataclasses.replace(
            self,
            name=f"{self.name}, original labels",
            supervise_gpt_role=True,
            learnt_tokens=("<|im_start|>", "<|im_end|>", "\n"),
        )

    def with_system(self, prompt: str | None) -> "Template":
        """The template with another system prompt; itself if `prompt` is None.

        Raises:
          RecordError: the template has no place for a system prompt.
        """
        if prompt is None:
            return self
        if self.system is None:
            able = ", ".join(sorted({t.name for t in TEMPLATES.values() if t.system}))
            raise RecordError(
                "system prompt",
                f"the template {self.name!r} has no place for a system prompt: remove the prompt "
                f"or choose one of {able}",
            )
        opening = prompt.join(self.system)
        replaced = "header" if self.first_human is None else "first_human"
        return dataclasses.replace(self, **{replaced: opening})


def _vicuna(name: str, person: str) -> Template:
    return Template(
        name=name,
        header=_CHAT_OF.format(person) + " ",
        system=("", " "),
        human=("USER: ", " "),
        gpt=("ASSISTANT: ", "</s>", ""),
        stop=("</s>",),
    )


def _chatml(name: str, prompt: str, newline: str) -> Template:
    system = "<|im_start|>system\n", f"<|im_end|>{newline}"
    return Template(
        name=name,
        header=prompt.join(system),
        system=system,
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
    # largest activations depend on the first token: with an image there, rounding to bfloat16
    # changes the gradient by more than its own size.
    dataclasses.replace(_PLAIN, name="plain_chatml", header="<|im_start|>"),
    Template(
        name="v0",
        header=_CHAT_OF.format("human") + "\n\n",
        system=("", "\n\n"),
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
        system=("[INST] <<SYS>>\n", "\n<</SYS>>\n\n"),
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
        system=("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"),
        human=("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
        gpt=("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>", ""),
        stop=("<|eot_id|>",),
    ),
    Template(
        name="phi_3",
        system=("<|system|>\n", "<|end|>\n"),
        human=("<|user|>\n", "<|end|>\n"),
        gpt=("<|assistant|>\n", "<|end|>", "\n"),
        stop=("<|end|>",),
    ),
    Template(
        name="seed_oss",
        system=("<seed:bos>system\n", "<seed:eos>"),
        human=("<seed:bos>user\n", "<seed:eos>"),
        gpt=("<seed:bos>assistant\n", "<seed:eos>", ""),
        stop=("<seed:eos>",),
    ),
)
TEMPLATES: dict[str, Template] = {template.name: template for template in _ALL}
# Other names of the same template, as in the original's flags.
TEMPLATES |= {
    "vicuna_v1": TEMPLATES["v1"],
    "llava_v0": TEMPLATES["v0"],
    "llava_llama_2": TEMPLATES["llama_2"],
    "mpt": TEMPLATES["chatml_direct"],
    "mistral_direct": TEMPLATES["chatml_direct"],
    "qwen_1_5": TEMPLATES["chatml"],
    "qwen_2": TEMPLATES["chatml"],
    "llava_llama_3": TEMPLATES["llama_3"],
}


def get_template(name: str) -> Template:
    """The template called `name`; LlavaError, with the known names, if there is none."""
    if name not in TEMPLATES:
        close = difflib.get_close_matches(name, TEMPLATES, 1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        known = ", ".join(sorted(TEMPLATES))
        raise LlavaError(f"unknown template {name!r}; {hint}known: {known}")
    return TEMPLATES[name]


def place_image(text: str) -> str:
    """Moves a lone `<image>` to the front of its turn; several stay where they were written."""
    if images_in(text) != 1:
        return text
    return f"{IMAGE_TOKEN}\n{text.replace(IMAGE_TOKEN, '').strip()}".strip()


def check_plain_text(text: str, placeholder: str | None) -> None:
    """Raises RecordError if a text holds the model's placeholder, spelled otherwise than `<image>`.

    It would be read as an image that is not there.
    """
    if placeholder not in (None, IMAGE_TOKEN) and placeholder in text:
        raise RecordError(
            "placeholder in a text",
            f"the text holds {placeholder}, which stands for an image in this model: write "
            f"{IMAGE_TOKEN} for an image, and leave {placeholder} out",
        )


def render(
    template: Template, turns: Sequence[Turn], generation: bool = False
) -> tuple[Segment, ...]:
    """The text of a conversation, cut into segments.

    Args:
      turns: alternating, human first.
      generation: the last turn is a human's, and the text ends where its answer starts.

    With `generation` there is no space at the end: tokenizers of the Llama and GPT-2 kinds join a
    space to the word after it, so the first token of the answer brings its own. The tokens of the
    prompt are then those of the whole conversation up to the answer, with two exceptions: an answer
    that begins with white space, which a tokenizer may join to what stands before it, and `llama_3`
    with a tokenizer of the GPT-2 kind, which cuts the two line breaks of its header by what follows
    them.

    Raises:
      RecordError: turns out of order, or ones that the template cannot write.
    """
    _check_order(template, turns, generation)
    if template.image_only_question:
        question = IMAGE_TOKEN * turns[0].images
        turns = (Turn("human", question), *turns[1:])
    learnt = template.learnt_tokens
    segments = [Segment(template.header, learnt_tokens=learnt)]
    for position, turn in enumerate(turns):
        if turn.role == "human":
            segments.append(_human_segment(template, turn.text, first=position == 0))
        else:
            before, end, after = template.gpt
            segments.append(Segment(before, template.supervise_gpt_role))
            segments += [Segment(turn.text + end, supervised=True), Segment(after, bool(learnt))]
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
    leading = template.human_leading_supervised_tokens
    return Segment(before + text + after, False, leading, template.learnt_tokens)


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


def render_turns(
    template: Template,
    turns: Sequence[Turn],
    mode: str,
    system: str | None = None,
    placeholder: str | None = None,
    rejected: str | None = None,
) -> list[tuple[Segment, ...]]:
    """The texts of one record: a single one, or with `mode` "independent" one for each question.

    If a record holds many questions about one picture, each answer can be learnt from the picture
    alone: every question sees the pictures and itself, not the questions and answers before it. A
    line of a label and a picture, "picture 1: <image>", belongs to the pictures. The part that all
    texts begin with is stored once in the row (`tokenization.token_row`). So it is with PAIR, for
    the two answers to a prompt.

    Args:
      system: replaces the template's system prompt.
      placeholder: of the model, see `check_plain_text`.
      rejected: with `mode` PAIR, the answer of the second text in place of the last one.
    Raises:
      RecordError: the template cannot write the turns or the system prompt; a text holds the
        placeholder; with "independent", an image stands after the start of the first question;
        `rejected` and `mode` do not go together.
    """
    for text in (system or "", rejected or "", *(turn.text for turn in turns)):
        check_plain_text(text, placeholder)
    template = template.with_system(system)
    if mode == PAIR:
        if rejected is None:
            raise RecordError(
                "not a pair", "there is no 'rejected': with config.loss=dpo each record is a pair"
            )
        return _render_pair(template, turns, rejected)
    if rejected is not None:
        raise RecordError(
            "a pair", "'rejected' is read with config.loss=dpo alone: set that, or leave it out"
        )
    if mode == "conversation":
        return [render(template, turns)]
    if len(turns) % 2:
        raise RecordError("no answer", "with data.turns=independent each question needs an answer")
    images = _LEADING_IMAGES.match(turns[0].text).group()
    questions = [turns[0].text[len(images) :], *(turn.text for turn in turns[2::2])]
    if any(map(images_in, questions)):
        raise RecordError(
            "image within the conversation",
            "with data.turns=independent all images must stand before the first question",
        )
    pairs = zip(questions, turns[1::2], strict=True)
    return [render(template, (Turn("human", images + q), answer)) for q, answer in pairs]


def _render_pair(
    template: Template, turns: Sequence[Turn], rejected: str
) -> list[tuple[Segment, ...]]:
    """A conversation with its last answer, and with `rejected` in place of it.

    Nothing before that answer is learnt.
    """
    *prompt, _ = turns
    answered = render(template, turns), render(template, (*prompt, Turn("gpt", rejected)))
    # The prompt's segments are those of a generation but for the header of the answer.
    heard = len(render(template, prompt, generation=True)) - bool(template.gpt[0].rstrip(" "))
    unlearnt = tuple(Segment(segment.text) for segment in answered[0][:heard])
    return [unlearnt + whole[heard:] for whole in answered]
