"""Token rows against an independent tokenization through the public Hugging Face call."""

import pickle
import re

import numpy as np
import pytest

from llava_jax.errors import LlavaError
from llava_jax.text.conversation import BREAK, Turn
from llava_jax.text.templates import TEMPLATES, Segment, render
from llava_jax.text.tokenization import SegmentTokenizer, truncate

IMAGE = -200
KINDS = ["smollm", "gpt2", "llama3", "llama2", "llama5"]
NAMES = sorted({template.name for template in TEMPLATES.values()} - {"plain", "plain_chatml"})
ANSWERS = ["blue", "", "   ", " blue", "\nblue", "ASSISTANT: no", "</s>", "a</s>b", "你好，世界",
           "<|im_end|>", "é🙂", "blue circle " * 400]  # fmt: skip


def turns_of(*texts):
    return [Turn(("human", "gpt")[i % 2], text) for i, text in enumerate(texts)]


def expected_row(tokenizer, segments, image_tokens):
    """ids and labels, token by token, from `tokenizer(chunk, return_offsets_mapping=True)`."""
    text = "".join(segment.text for segment in segments)
    learnt, owner = [], []
    for number, segment in enumerate(segments):
        learnt += [segment.supervised] * len(segment.text)
        owner += [number] * len(segment.text)
    ids, labels, used, position = [], [], {}, 0
    for number, chunk in enumerate(text.split("<image>")):
        if number:
            ids += [IMAGE] * image_tokens
            labels += [-100] * image_tokens
            position += len("<image>")
        encoded = tokenizer(chunk, return_offsets_mapping=True, return_special_tokens_mask=True)
        for token, (start, end), added in zip(
            encoded["input_ids"], encoded["offset_mapping"], encoded["special_tokens_mask"],
            strict=True,
        ):  # fmt: skip
            if added:
                if number == 0:
                    ids.append(token)
                    labels.append(-100)
                continue
            touched = range(position + start, position + max(end, start + 1))
            label = any(learnt[c] for c in touched)
            for segment in sorted({owner[c] for c in touched}):
                used[segment] = used.get(segment, 0) + 1
                label = label or used[segment] <= segments[segment].leading_supervised_tokens
            ids.append(token)
            labels.append(token if label else -100)
        position += len(chunk)
    return ids, labels


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_ids_and_labels(tokenizers, kind, name):
    tokenizer = SegmentTokenizer(tokenizers[kind])
    # gpt2 has the ids of smollm and offsets without spaces: the truth is smollm's.
    reference = tokenizers["smollm" if kind == "gpt2" else kind]
    for answer in ANSWERS:
        segments = render(TEMPLATES[name], turns_of("<image>\nq?", answer, " more 你", "yes"))
        row = tokenizer(segments, [3])
        ids, labels = expected_row(reference, segments, 3)
        assert row.input_ids.tolist() == ids
        assert row.labels.tolist() == labels
        assert tokenizer.measure([segments, segments], [[3], [3]])[0].tolist() == [len(ids)] * 2
        ((start, end),) = row.image_spans
        assert (row.input_ids[start:end] == IMAGE).all() and end - start == 3
        assert (row.input_ids == IMAGE).sum() == 3


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_are_tokenized_alone_with_one_bos(tokenizers, kind):
    tokenizer = tokenizers[kind]
    row = SegmentTokenizer(tokenizer)([Segment("<image>a <image>\nb")], [2, 1])
    bos = [i for i in tokenizer("").input_ids]
    chunk = [tokenizer(text).input_ids[len(bos) :] for text in ("", "a ", "\nb")]
    assert row.input_ids.tolist() == bos + [IMAGE] * 2 + chunk[1] + [IMAGE] + chunk[2]
    assert len(bos) == (0 if kind in ("smollm", "gpt2") else 1)


def test_the_chatml_start_is_not_taken_for_an_added_bos(tokenizers):
    tokenizer = tokenizers["smollm"]
    row = SegmentTokenizer(tokenizer)([Segment("<|im_start|>user\n<image>\nhi")], [1])
    after = row.input_ids[row.image_spans[0][1] :].tolist()
    assert row.input_ids[0] == tokenizer.bos_token_id
    assert after == tokenizer("\nhi").input_ids


def test_v0_learns_the_first_two_tokens_of_a_question(tokenizers):
    tokenizer = tokenizers["smollm"]
    segments = render(TEMPLATES["v0"], turns_of("q", "a", "q2", "b"))
    row = SegmentTokenizer(tokenizer)(segments)
    learnt = row.labels != -100
    runs = re.findall("1+|0+", "".join("01"[int(x)] for x in learnt))
    text = "".join(s.text for s in segments)
    second = text.index("### Human: q2")
    inside = (row.offsets[:, 0] >= second) & (row.offsets[:, 1] <= text.index("### Assistant: b"))
    assert learnt[inside].sum() == 2 and learnt[np.flatnonzero(inside)[:2]].all()
    assert runs[0][0] == "0" and len(runs[1]) == 2 and learnt[-1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*NAMES, "plain", "plain_chatml"])
@pytest.mark.parametrize("answer", ["blue", "Yes.", "你好", ""])
def test_a_prompt_is_the_beginning_of_its_training_row(tokenizers, kind, name, answer):
    if name == "llama_3" and kind in ("smollm", "gpt2"):
        pytest.skip("these cut the header's two line breaks apart, but not at the end of a prompt")
    tokenizer = SegmentTokenizer(tokenizers[kind])
    prompt = tokenizer(render(TEMPLATES[name], turns_of("<image>\nq"), generation=True), [3])
    full = tokenizer(render(TEMPLATES[name], turns_of("<image>\nq", answer)), [3])
    assert full.input_ids[: len(prompt)].tolist() == prompt.input_ids.tolist()
    learnt = np.flatnonzero(full.labels != -100)
    roles_learnt = name == "v0"
    between = 0 if roles_learnt else learnt[0] - len(prompt)
    # Between prompt and answer there may be one piece: the space a tokenizer keeps by itself.
    assert between in (0, 1)
    if between:
        start, end = full.offsets[len(prompt)]
        text = "".join(s.text for s in render(TEMPLATES[name], turns_of("<image>\nq", answer)))
        assert text[start:end] == " "


def test_plain_chatml_begins_with_the_token_that_chatml_texts_begin_with(tokenizers):
    """Behind an image token in its place, SmolLM2's gradients are lost in bfloat16's rounding."""
    tokenizer = tokenizers["smollm"]
    segments = render(TEMPLATES["plain_chatml"], turns_of("<image>", "blue"))
    row = SegmentTokenizer(tokenizer)(segments, [2])
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert row.input_ids[:3].tolist() == [start, IMAGE, IMAGE]
    assert (row.labels[:3] == -100).all()


def test_plain_learns_the_first_token_after_the_image(tokenizers):
    for kind in KINDS:
        for caption in ("blue", "你好"):
            row = SegmentTokenizer(tokenizers[kind])(
                render(TEMPLATES["plain"], turns_of("<image>", caption)), [2]
            )
            assert (row.labels[row.image_spans[0][1] :] != -100).all()


def test_start_and_end_tokens(tokenizers):
    with pytest.raises(LlavaError, match="<im_start>"):
        SegmentTokenizer(tokenizers["smollm"], use_im_start_end=True)
    tokenizer = pickle.loads(pickle.dumps(tokenizers["smollm"]))
    tokenizer.add_tokens(["<im_start>", "<im_end>"], special_tokens=True)
    segments = [Segment("q <image>\nw"), Segment("a", supervised=True)]
    wrapped = SegmentTokenizer(tokenizer, use_im_start_end=True)
    row = pickle.loads(pickle.dumps(wrapped))(segments, [2])
    start, end = tokenizer.convert_tokens_to_ids(["<im_start>", "<im_end>"])
    ((first, last),) = row.image_spans
    assert row.input_ids[first - 1] == start and row.input_ids[last] == end
    assert (row.labels != -100).sum() == 1 and row.labels[-1] == row.input_ids[-1]
    assert wrapped.text(segments) == "q <im_start><image><im_end>\nwa"
    assert wrapped.measure([segments], [[2]])[0].tolist() == [len(row)]


def test_truncation(tokenizers):
    tokenizer = SegmentTokenizer(tokenizers["smollm"])
    row = tokenizer([Segment("q<image>"), Segment("blue " * 10, True), Segment("<image>x")], [4, 4])
    (_, end), (second, last) = row.image_spans
    whole, reason = truncate(row, len(row))
    assert reason is None and whole.input_ids.tolist() == row.input_ids.tolist()
    for length in (0, 1, end - 1, end, second, last - 1):
        cut, reason = truncate(row, length)
        assert cut is None and "image" in reason
    text = tokenizer([Segment("q<image>"), Segment("blue " * 10, True), Segment("end")], [4])
    cut, reason = truncate(text, end + 1)
    assert reason is None and len(cut) == end + 1 and len(cut.labels) == len(cut.offsets) == end + 1
    assert truncate(text, end)[1] == "no supervised token is left"


def test_a_tokenizer_without_offsets_is_refused():
    with pytest.raises(LlavaError, match="offsets"):
        SegmentTokenizer(object())


def original_labels(tokenizer, messages: list[tuple[str, str]]) -> tuple[list, list]:
    """Ids and labels as `preprocess_qwen` of LLaVA-NeXT makes them, message by message."""
    ids, labels = [], []
    for role, text in messages:
        pieces = f"<|im_start|>{role}\n{text}<|im_end|>\n".split("<image>")
        own = tokenizer(pieces[0]).input_ids
        for piece in pieces[1:]:
            own += [IMAGE] + tokenizer(piece).input_ids
        ids += own
        labels += own if role == "assistant" else [-100] * len(own)
    (newline,) = tokenizer("\n").input_ids
    marks = {newline, *map(tokenizer.convert_tokens_to_ids, ("<|im_start|>", "<|im_end|>"))}
    return ids, [i if i in marks else label for i, label in zip(ids, labels, strict=True)]


def test_tokens_that_are_always_learnt_are_looked_up_once(tokenizers, monkeypatch):
    template = TEMPLATES["chatml"].with_original_labels()
    segments = render(template, turns_of("What?", "a cat", "Sure?", "yes"))
    tokenizer = SegmentTokenizer(tokenizers["smollm"])
    row = tokenizer(segments)
    tokenizer = pickle.loads(pickle.dumps(tokenizer))
    encode, encoded = tokenizer._core.encode, []

    class Core:
        encode_batch = tokenizer._core.encode_batch
        encode = lambda _, text, **options: encoded.append(text) or encode(text, **options)

    monkeypatch.setattr(tokenizer, "_core", Core())
    assert tokenizer(segments).labels.tolist() == row.labels.tolist() and not encoded


def test_original_labels_are_those_of_llava_next(tokenizers):
    template = TEMPLATES["chatml"].with_original_labels()
    turns = turns_of("<image>\nWhat\nis it?", "a cat\n\nor two", "Sure?", "yes")
    row = SegmentTokenizer(tokenizers["smollm"])(render(template, turns), [1])
    roles = {"human": "user", "gpt": "assistant"}
    messages = [("system", "You are a helpful assistant.")]
    messages += [(roles[turn.role], turn.text) for turn in turns]
    ids, labels = original_labels(tokenizers["smollm"], messages)
    assert row.input_ids.tolist() == ids and row.labels.tolist() == labels
    plain = SegmentTokenizer(tokenizers["smollm"])(render(TEMPLATES["chatml"], turns), [1])
    assert (plain.labels != -100).sum() < (row.labels != -100).sum()
    with pytest.raises(LlavaError, match="'original', which is for the template 'chatml' and not"):
        TEMPLATES["v1"].with_original_labels()
    with pytest.raises(LlavaError, match="im_start.*', which is to be learnt, is no token"):
        SegmentTokenizer(tokenizers["llama2"])(render(template, turns), [1])


def test_rows_of_what_is_too_long_are_those_of_each_alone(tokenizers):
    tokenizer = SegmentTokenizer(tokenizers["llama2"])
    short = [Segment("<image>\nq"), Segment("a", True)]
    long = [Segment("q <image>\n"), Segment("blue " * 9, True), Segment(BREAK + "x")]
    lengths, rows = tokenizer.measure([short, long, short], [[2], [3], [2]], limit=12)
    few, many = len(tokenizer(short, [2])), len(tokenizer(long, [3]))
    assert lengths.tolist() == [few, many, few] and few <= 12 < many
    assert list(rows) == [1]
    alone = tokenizer(long, [3])
    for name in ("input_ids", "labels", "offsets"):
        assert (getattr(rows[1], name) == getattr(alone, name)).all()
    assert rows[1].image_spans == alone.image_spans
