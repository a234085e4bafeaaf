"""The lmms-eval adapter, against lmms-eval where it is installed, else against its interface."""

import dataclasses
import functools
import sys
from types import ModuleType, SimpleNamespace

import pytest

from llava_jax.data.video import Video
from llava_jax.errors import LlavaError
from llava_jax.inference.model import Llava
from tests.tiny_model import random_image, tiny_llava


def interface() -> dict[str, ModuleType]:
    """The few names of lmms-eval 0.7.3 that the adapter uses, as it declares them."""

    class lmms:
        is_simple = True

        def __init__(self):
            self.cache_hook = None
            self.task_dict = {}

    def dataclass(name, *fields):
        return dataclasses.make_dataclass(name, [(f, object, None) for f in fields])

    contents = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.models": {},
        "lmms_eval.api.model": {"lmms": lmms},
        "lmms_eval.api.instance": {
            "TokenCounts": dataclass("TokenCounts", "input_tokens", "output_tokens"),
            "GenerationResult": dataclass("GenerationResult", "text", "token_counts"),
        },
        "lmms_eval.models.registry_v2": {
            "ModelManifest": dataclass(
                "ModelManifest", "model_id", "simple_class_path", "chat_class_path", "aliases"
            )
        },
    }
    modules = {name: ModuleType(name) for name in contents}
    for name, values in contents.items():
        vars(modules[name]).update(values)
    return modules


@pytest.fixture(scope="module")
def adapter():
    with pytest.MonkeyPatch.context() as patch:
        try:
            import lmms_eval.models.registry_v2  # noqa: F401
        except ImportError:
            for name, module in interface().items():
                patch.setitem(sys.modules, name, module)
        import llava_jax.evaluation.lmms_adapter as module

        yield module
        sys.modules.pop(module.__name__)


class Cache:
    def __init__(self):
        self.lines = []

    def add_partial(self, *line):
        self.lines.append(line)


llava = functools.cache(tiny_llava)
DOCS = [{"question": f"what is it, {i}?", "image": random_image(i)} for i in range(5)]
GREEDY = {"max_new_tokens": 6, "temperature": 0, "do_sample": False, "until": ["\n\n"]}


def messages(doc):
    content = [{"type": "image", "url": doc["image"]}, {"type": "text", "text": doc["question"]}]
    return [{"role": "user", "content": content}]


def make(cls, monkeypatch, docs=DOCS, **settings):
    """The model, with its parameters made here, and the requests of `docs`."""
    monkeypatch.setattr(Llava, "from_pretrained", lambda path, dtype, mesh: llava())
    model = cls(pretrained="runs/llava", device="cuda", batch_size="2", **settings)
    model.task_dict = {"task": {"test": docs}}
    model.cache_hook = Cache()
    return model


def requests(simple, docs=DOCS, settings=GREEDY, visual=lambda doc: [doc["image"]], text=messages):
    for i, doc in enumerate(docs):
        end = (i, "task", "test")
        head = (doc["question"], settings, visual) if simple else ("", text, settings)
        yield SimpleNamespace(args=(*head, *end))


@pytest.mark.parametrize("simple", [False, True])
def test_answers_are_the_models_own_in_order(adapter, monkeypatch, simple):
    model = make(adapter.LlavaJaxSimple if simple else adapter.LlavaJax, monkeypatch)
    monkeypatch.setattr(adapter, "BATCHES_AT_A_TIME", 1)
    results = model.generate_until(list(requests(simple)))
    expected = llava().generate(
        [doc["question"] for doc in DOCS], [doc["image"] for doc in DOCS], max_new_tokens=6
    )
    assert [result.text for result in results] == expected and len(set(expected)) > 1
    prompt = llava().request(DOCS[0]["question"], DOCS[0]["image"], adapter.SamplingParams(6))
    assert results[0].token_counts.input_tokens == len(prompt.input_ids)
    assert [line[2] for line in model.cache_hook.lines] == expected
    assert model.is_simple == simple


def test_the_manifest_names_both_classes(adapter):
    manifest = adapter.manifest()
    assert manifest.model_id == "llava_jax"
    for path, simple in ((manifest.simple_class_path, True), (manifest.chat_class_path, False)):
        assert getattr(adapter, path.rpartition(".")[2]).is_simple == simple


def test_until_ends_answers_only_when_asked(adapter, monkeypatch):
    text = llava().generate(DOCS[0]["question"], DOCS[0]["image"], max_new_tokens=6)
    settings = {**GREEDY, "until": [text[2]]}
    for use_until, expected in ((False, text), (True, text[: text.index(text[2])].strip())):
        model = make(adapter.LlavaJax, monkeypatch, use_until=use_until)
        (result,) = model.generate_until(list(requests(False, DOCS[:1], settings)))
        assert result.text == expected


def test_messages_become_turns_with_their_pictures_in_place(adapter):
    image = random_image(0)
    said = [
        {"role": "system", "content": [{"type": "text", "text": "Be short."}]},
        {"role": "user", "content": [{"type": "image", "url": image},
                                     {"type": "text", "text": "an <image> of?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]},
        {"role": "user", "content": [{"type": "text", "text": "and "},
                                     {"type": "image", "url": image},
                                     {"type": "text", "text": "this?"}]},
    ]  # fmt: skip
    assert adapter.read_messages(said) == [
        ("Be short.\n<image>\nan  of?", "a cat"),
        ("and <image>\nthis?", ""),
        [image, image],
    ]


def test_videos_stand_in_messages_and_before_texts(adapter, monkeypatch):
    said = [{"role": "user", "content": [{"type": "video", "url": "a.mp4", "start_time": None},
                                         {"type": "text", "text": "a <video> of?"}]}]  # fmt: skip
    assert adapter.read_messages(said) == [("<image>\na  of?", ""), [Video("a.mp4")]]
    model = make(adapter.LlavaJaxSimple, monkeypatch)
    asked = []
    monkeypatch.setattr(model.model, "request", lambda *args, **_: asked.append(args[1]))
    (one,) = requests(True, DOCS[:1], visual=lambda doc: ["frames"])
    model._request(*one.args, seed=0)
    assert asked == [[Video("frames")]]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"settings": {**GREEDY, "num_beams": 4}}, "no beam search: num_beams is 4"),
        ({"text": lambda doc: [{"role": "user", "content": [{"type": "audio", "url": "x"}]}]},
         "a message contains audio"),
        ({"text": lambda doc: [{"role": "user", "content": [{"type": "video", "url": "x"}]}]},
         "the model takes pictures, not videos"),
        ({"text": lambda doc: [{"role": "user", "content": [
            {"type": "video", "url": "x", "start_time": 2.0}]}]}, "only whole ones are shown"),
        ({"text": lambda doc: []}, "no message is from the user"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_reported(adapter, monkeypatch, change, message):
    model = make(adapter.LlavaJax, monkeypatch)
    with pytest.raises(LlavaError, match=message):
        model.generate_until(list(requests(False, **change)))


def test_wrong_model_args_are_reported(adapter, monkeypatch):
    with pytest.raises(LlavaError, match="unknown model_args conv_template: known are pretrained"):
        make(adapter.LlavaJax, monkeypatch, conv_template="vicuna_v1")
    monkeypatch.setattr(Llava, "from_pretrained", lambda path, dtype, mesh: llava())
    with pytest.raises(LlavaError, match="batch_size must be a whole number from 1, not 'auto'"):
        adapter.LlavaJax(pretrained="runs/llava", batch_size="auto")
