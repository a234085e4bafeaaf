import pytest

from llava_jax.errors import LlavaError, RecordError
from llava_jax.text.conversation import Turn
from llava_jax.text.templates import TEMPLATES, get_template, place_image, render

USER_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
HUMAN_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the human's questions."
)
VISION_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual "
    "content that the user provides, and assist the user with a variety of tasks using natural "
    "language."
)
START, END = "<|start_header_id|>", "<|end_header_id|>\n\n"
# Two rounds, written out by hand; {{ }} enclose what is learnt. v0's extra tokens are tested with
# the tokenizers.
TWO_ROUNDS = {
    "v0": HUMAN_SYSTEM + "\n\n### Human: <image>\nq1\n{{### Assistant: a1\n}}### Human: q2\n"
    "{{### Assistant: a2\n### }}",
    "v1": USER_SYSTEM + " USER: <image>\nq1 ASSISTANT: {{a1</s>}}USER: q2 ASSISTANT: {{a2</s>}}",
    "llava_v1": HUMAN_SYSTEM
    + " USER: <image>\nq1 ASSISTANT: {{a1</s>}}USER: q2 ASSISTANT: {{a2</s>}}",
    "llama_2": f"[INST] <<SYS>>\n{VISION_SYSTEM}\n<</SYS>>\n\n<image>\nq1 [/INST] "
    "{{a1 </s>}}<s>[INST] q2 [/INST] {{a2 </s>}}",
    "mistral_instruct": "[INST] <image>\nq1 [/INST] {{a1 </s>}}[INST] q2 [/INST] {{a2 </s>}}",
    "chatml_direct": "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n"
    "<image>\nq1<|im_end|><|im_start|>assistant\n{{a1<|im_end|>}}<|im_start|>user\nq2<|im_end|>"
    "<|im_start|>assistant\n{{a2<|im_end|>}}",
    "chatml": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    "<image>\nq1<|im_end|>\n<|im_start|>assistant\n{{a1<|im_end|>}}\n<|im_start|>user\nq2"
    "<|im_end|>\n<|im_start|>assistant\n{{a2<|im_end|>}}\n",
    "llama_3": f"{START}system{END}{VISION_SYSTEM}<|eot_id|>{START}user{END}<image>\nq1<|eot_id|>"
    f"{START}assistant{END}{{{{a1<|eot_id|>}}}}{START}user{END}q2<|eot_id|>"
    f"{START}assistant{END}{{{{a2<|eot_id|>}}}}",
    "phi_3": "<|user|>\n<image>\nq1<|end|>\n<|assistant|>\n{{a1<|end|>}}\n<|user|>\nq2<|end|>\n"
    "<|assistant|>\n{{a2<|end|>}}\n",
    "seed_oss": "<seed:bos>user\n<image>\nq1<seed:eos><seed:bos>assistant\n{{a1<seed:eos>}}"
    "<seed:bos>user\nq2<seed:eos><seed:bos>assistant\n{{a2<seed:eos>}}",
}
# The text before the first question, with a system prompt of the record's own.
OWN_SYSTEM = {
    "v0": "S.\n\n### Human: ",
    "v1": "S. USER: ",
    "llava_v1": "S. USER: ",
    "llama_2": "[INST] <<SYS>>\nS.\n<</SYS>>\n\n",
    "chatml_direct": "<|im_start|>system\nS.<|im_end|><|im_start|>user\n",
    "chatml": "<|im_start|>system\nS.<|im_end|>\n<|im_start|>user\n",
    "llama_3": f"{START}system{END}S.<|eot_id|>{START}user{END}",
    "phi_3": "<|system|>\nS.<|end|>\n<|user|>\n",
    "seed_oss": "<seed:bos>system\nS.<seed:eos><seed:bos>user\n",
}
GENERATION_END = {
    "plain": "<image>", "plain_chatml": "<image>",
    "v0": "### Assistant:", "v1": " ASSISTANT:", "llava_v1": " ASSISTANT:",
    "llama_2": "q [/INST]", "mistral_instruct": "q [/INST]",
    "chatml_direct": "q<|im_end|><|im_start|>assistant\n",
    "chatml": "q<|im_end|>\n<|im_start|>assistant\n",
    "llama_3": f"q<|eot_id|>{START}assistant{END}",
    "phi_3": "q<|end|>\n<|assistant|>\n", "seed_oss": "q<seed:eos><seed:bos>assistant\n",
}  # fmt: skip


def marked(segments):
    text = "".join(f"{{{{{s.text}}}}}" if s.supervised else s.text for s in segments)
    return text.replace("}}{{", "")


def dialogue(*texts):
    return [Turn(("human", "gpt")[i % 2], text) for i, text in enumerate(texts)]


@pytest.mark.parametrize("name", TWO_ROUNDS)
def test_two_rounds(name):
    turns = dialogue("q1\n<image>", "a1", "q2", "a2")
    assert marked(render(TEMPLATES[name], turns)) == TWO_ROUNDS[name]


@pytest.mark.parametrize("name", sorted({template.name for template in TEMPLATES.values()}))
def test_a_system_prompt_of_the_records_own(name):
    template, turns = TEMPLATES[name], dialogue("<image>\nq1", "a1")
    text = lambda template: "".join(segment.text for segment in render(template, turns))
    assert template.with_system(None) is template
    if name not in OWN_SYSTEM:
        with pytest.raises(RecordError, match=f"{name}.*has no place for a system prompt.*chatml"):
            template.with_system("S.")
        return
    own = text(template.with_system("S."))
    assert own.startswith(OWN_SYSTEM[name] + "<image>")
    assert text(template).endswith(own[len(OWN_SYSTEM[name]) :])  # nothing else changes


def test_every_template_is_covered():
    names = {t.name for t in TEMPLATES.values()}
    assert names == {*TWO_ROUNDS, "plain", "plain_chatml"} == {*GENERATION_END}


@pytest.mark.parametrize("name, start", [("plain", ""), ("plain_chatml", "<|im_start|>")])
def test_plain_keeps_only_image_and_caption(name, start):
    segments = render(TEMPLATES[name], dialogue("Describe this.\n<image>", " a cat "))
    assert marked(segments) == start + "<image>{{ a cat \n}}"


@pytest.mark.parametrize("name", ["plain", "plain_chatml"])
@pytest.mark.parametrize("turns", [("q", "a"), ("<image>", "a", "q", "a")])
def test_plain_takes_captions_only(name, turns):
    with pytest.raises(RecordError, match=f"'{name}' takes captions"):
        render(TEMPLATES[name], dialogue(*turns))


def test_empty_and_odd_answers_are_kept():
    odd = ["", "   ", "ASSISTANT: no", "</s>", "你好\n"]
    for answer in odd:
        text = marked(render(TEMPLATES["v1"], dialogue("q", answer)))
        assert text.endswith("USER: q ASSISTANT: {{" + answer + "</s>}}")


@pytest.mark.parametrize("name", GENERATION_END)
def test_generation_stops_where_the_answer_starts(name):
    segments = render(TEMPLATES[name], dialogue("<image>q"), generation=True)
    prompt = "".join(segment.text for segment in segments)
    assert prompt.endswith(GENERATION_END[name])
    answered = render(TEMPLATES[name], dialogue("<image>q", "a"))
    assert "".join(segment.text for segment in answered).startswith(prompt)
    assert TEMPLATES[name].stop


def test_generation_with_history():
    segments = render(TEMPLATES["v1"], dialogue("q", "a", "r"), generation=True)
    assert "".join(s.text for s in segments).endswith("ASSISTANT: a</s>USER: r ASSISTANT:")
    with pytest.raises(RecordError):
        render(TEMPLATES["v1"], dialogue("q", "a"), generation=True)


def test_image_placement():
    assert place_image("  look <image> here ") == "<image>\nlook  here"
    assert place_image("<image>") == "<image>"
    assert place_image("q <image>\n") == "<image>\nq"
    assert place_image(" compare <image> with <image>") == " compare <image> with <image>"
    assert place_image(" no image ") == " no image "


def test_names():
    assert get_template("vicuna_v1") is get_template("v1")
    assert get_template("mpt") is get_template("chatml_direct")
    with pytest.raises(LlavaError, match="known: .*chatml"):
        get_template("v2")
