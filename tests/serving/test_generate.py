"""`llava-jax generate`: order, errors among good requests, resuming, settings."""

import argparse
import base64
import contextlib
import json
import re

import pytest

from llava_jax import cli
from llava_jax.errors import LlavaError
from llava_jax.inference import model
from llava_jax.serving import command_line, generate
from llava_jax.serving.answer_file import open_answers
from tests.tiny_model import random_image, tiny_llava


@pytest.fixture(scope="module")
def llava():
    return tiny_llava()


@pytest.fixture
def run(llava, tmp_path, monkeypatch):
    """Runs the command with more arguments; gives the lines of the answers."""
    monkeypatch.setattr(model.Llava, "from_pretrained", lambda *_, **__: llava)
    monkeypatch.setattr(command_line, "keep_compilations", lambda: None)
    for i in range(2):
        random_image(i).save(tmp_path / f"{i}.png")

    def command(*arguments) -> list[dict]:
        parser = argparse.ArgumentParser()
        generate.add_arguments(parser)
        files = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")]
        given = [*files, "--checkpoint", str(tmp_path), "--batch_size", "4", *arguments]
        assert generate.main(parser.parse_args(given)) == 0
        return [json.loads(line) for line in open(tmp_path / "out.jsonl", encoding="utf-8")]

    return command


def write(path, lines) -> None:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_bytes("".join(text + "\n" for text in texts).encode("utf-8", "surrogateescape"))


def good(count: int) -> list[dict]:
    """Requests whose answers differ in length, so that they end out of order."""
    return [
        {"id": f"q{i}", "prompt": f"{i}?", "max_tokens": 1 + 5 * (i % 3), "ignore_eos": True,
         "images": [[], "0.png", ["1.png"]][i % 3]}
        for i in range(count)
    ]  # fmt: skip


def test_answers_stand_in_the_order_of_the_requests(run, llava, tmp_path, capsys):
    requests = good(9)
    write(tmp_path / "in.jsonl", requests)
    lines = run()
    assert [line["id"] for line in lines] == [request["id"] for request in requests]
    for request, line in zip(requests, lines, strict=True):
        names = request["images"]
        images = [tmp_path / name for name in ([names] if isinstance(names, str) else names)]
        ((answer,),) = llava.complete(
            [request["prompt"]], [images], max_tokens=request["max_tokens"], ignore_eos=True
        )
        assert line["text"] == answer.text and line["finish_reason"] == "length"
        assert line["completion_tokens"] == request["max_tokens"]
        assert line["prompt_tokens"] == answer.prompt_tokens
    assert "requests/s" in capsys.readouterr().err


def test_devices_are_those_asked_for(run, llava, tmp_path, monkeypatch):
    write(tmp_path / "in.jsonl", good(1))
    meshes = []
    keep = lambda *_, mesh, **__: meshes.append(mesh and dict(mesh.shape)) or llava
    monkeypatch.setattr(model.Llava, "from_pretrained", keep)
    run()
    run("--tensor", "4", "--overwrite")
    run("--replicas", "2", "--tensor", "3", "--overwrite")
    run("--data", "2", "--tensor", "3", "--overwrite")  # the earlier name
    four, six = ({"data": d, "fsdp": 1, "tensor": t} for d, t in ((1, 4), (2, 3)))
    assert meshes == [None, four, six, six]
    with pytest.raises(LlavaError, match="data=3, fsdp=1, tensor=3 does not fit 8 devices"):
        run("--replicas", "3", "--tensor", "3")


def test_the_model_is_loaded_as_the_flags_say(run, llava, tmp_path, monkeypatch):
    write(tmp_path / "in.jsonl", good(1))
    loaded = []
    keep = lambda *_, **options: loaded.append(options) or llava
    monkeypatch.setattr(model.Llava, "from_pretrained", keep)
    words = ("--quantize", "int8", "--kv_cache", "int8", "--lookup", "3")
    run(*words, "--template", "v1", "--dtype", "mixed")
    run("--weights", "int8", "--overwrite")  # the earlier name
    first, second = loaded
    assert (first["quantize"], first["kv_cache"], first["template"]) == ("int8", "int8", "v1")
    assert first["dtype"] == "mixed" and second["quantize"] == "int8"
    assert second["template"] is None and (first["lookup"], second["lookup"]) == (3, 0)


def test_wrong_requests_get_an_error_and_spare_the_others(run, tmp_path, capsys):
    data = "data:image/png;base64,"
    picture = base64.b64encode((tmp_path / "0.png").read_bytes()).decode()
    (tmp_path / "broken.png").write_bytes(b"\x89PNG broken")
    wrong = {
        "{not json": "not a line of JSON",
        '"text"': "must be a JSON object",
        '{"id": 5}': "a text 'prompt'",
        '{"prompt": "a", "images": "no.png"}': "no.png",
        '{"prompt": "a", "images": "broken.png"}': "broken.png",
        '{"prompt": "a", "images": "b\\u0000.png"}': "no image file",
        '{"prompt": "a", "images": "."}': "is not a file",
        '{"prompt": "a", "images": "data:image/png;base64,\\u00e9"}': "cannot be decoded",
        '{"prompt": "a", "images": [7]}': "images must be paths",
        '{"prompt": "a", "images": ""}': "images must be paths or addresses, none empty",
        '{"prompt": "a", "images": "HTTPS://localhost/a.png"}': "allow addresses",
        '{"prompt": "a\\ud800"}': "half a character, U+D800, at 1",
        '{"prompt": "a", "stop": 5}': "stop must be a list",
        '{"prompt": "a", "n": 1000000}': "n must be a whole number from 1 to",
        '{"prompt": "a", "stop_token_ids": [1000000000000]}': "stop_token_ids must be",
        '{"prompt": "a\udcff"}': "not a line of JSON: 'utf-8' codec",  # a byte that is no UTF-8
        '{"prompt": "a", "images": "http://localhost/a.png"}': "allow addresses",
        '{"prompt": "a <image>"}': "1 <image> but 0",
        '{"prompt": "a", "temprature": 1}': "did you mean temperature",
        '{"prompt": "a", "imagse": "0.png"}': "unknown key 'imagse': did you mean image",
        '{"prompt": "a", "image": "0.png", "images": "1.png"}': "in images or in image, not in",
        '{"prompt": "a", "image": {"bytes": ""}}': "image must be paths or addresses",
        '{"prompt": "a", "system": ["b"]}': "system must be a text",
        '{"prompt": "a", "max_tokens": 0}': "max_tokens must be",
        '{"prompt": "a", "history": "b"}': "history must be",
        '{"prompt": "a", "history": [["b"]]}': "pairs",
        json.dumps({"prompt": "a" * 600}): "leaves no room",
        "": "not a line of JSON",
    }
    fine = {"prompt": "a?", "images": data + picture, "max_tokens": 3}
    lines = [entry for text in wrong for entry in (text, fine)]
    write(tmp_path / "in.jsonl", lines)
    answers = run()
    assert len(answers) == len(lines)
    for at, message in enumerate(wrong.values()):
        assert message in answers[2 * at]["error"], answers[2 * at]
    assert f"wrong requests: {len(wrong)};" in capsys.readouterr().err
    texts = {line["text"] for line in answers[1::2]}
    assert len(texts) == 1 and answers[4]["id"] == 5 and answers[1]["id"] == 1
    assert answers[5]["id"] == "line 5"  # 5 is the id of another


def test_a_killed_run_continues_and_repairs_its_last_line(run, llava, tmp_path):
    write(tmp_path / "in.jsonl", good(9))
    whole = run()
    raw = (tmp_path / "out.jsonl").read_bytes()
    ends = [i + 1 for i, byte in enumerate(raw) if byte == ord("\n")]
    for keep in (0, 1, ends[2], ends[2] + 7, ends[3] - 1, ends[-1] - 1, len(raw)):
        (tmp_path / "out.jsonl").write_bytes(raw[:keep])
        before = llava.engine.counts.requests
        assert run() == whole
        assert (tmp_path / "out.jsonl").read_bytes() == raw
        done = sum(end <= keep for end in ends)
        assert llava.engine.counts.requests - before == 9 - done


def test_ids_are_given_back_whatever_they_are(run, tmp_path):
    ids = ["a", "a", None, 1.5, {"b": [2]}, "\ud800"]
    write(tmp_path / "in.jsonl", [{"id": id, "prompt": "a?", "max_tokens": 1} for id in ids])
    assert [line["id"] for line in run()] == ids


def test_a_request_without_an_id_never_has_that_of_another(run, tmp_path):
    ids = [3, "line 5", None, ..., ..., ...]
    lines = [{"prompt": "a?", "max_tokens": 1} | ({} if i is ... else {"id": i}) for i in ids]
    write(tmp_path / "in.jsonl", lines)
    assert [line["id"] for line in run()] == [3, "line 5", None, "line 3", 4, 5]
    write(tmp_path / "in.jsonl", [{"prompt": "a?", "max_tokens": 1, "id": "line 1"},
                                  {"prompt": "a?", "max_tokens": 1},
                                  {"prompt": "a?", "max_tokens": 1, "id": 1}])  # fmt: skip
    assert [line["id"] for line in run("--overwrite")] == ["line 1", "line 1'", 1]


def test_pictures_and_system_prompts_are_read_under_the_keys_of_records(run, llava, tmp_path):
    request = {"prompt": "a?", "max_tokens": 4}
    lines = [{"image": "0.png"}, {"images": ["0.png"]}, {"image": ["0.png"]}]
    lines += [{"image": None, "images": "0.png"}, {"image": "0.png", "system": "Be brief."}]
    write(tmp_path / "in.jsonl", [request | line for line in lines])
    *same, brief = (line["text"] for line in run())
    assert set(same) == {llava.generate("a?", tmp_path / "0.png", max_tokens=4)}
    assert brief == llava.chat("a?", tmp_path / "0.png", system="Be brief.", max_tokens=4)
    assert brief != same[0]


def test_every_batch_may_end_at_its_first_token(run, tmp_path):
    write(tmp_path / "in.jsonl", [{"prompt": "a?", "max_tokens": 1}] * 11)
    assert [line["completion_tokens"] for line in run()] == [1] * 11


def test_no_requests_make_no_answers(run, tmp_path):
    write(tmp_path / "in.jsonl", [])
    assert run() == []


def test_the_requests_are_never_written_to(run, tmp_path):
    write(tmp_path / "in.jsonl", good(1))
    before = (tmp_path / "in.jsonl").read_bytes()
    (tmp_path / "link.jsonl").symlink_to("in.jsonl")
    for name in ("in.jsonl", "link.jsonl"):
        with pytest.raises(LlavaError, match="--output is the file of requests"):
            run("--output", str(tmp_path / name), "--overwrite")
    assert (tmp_path / "in.jsonl").read_bytes() == before


def test_two_runs_do_not_write_to_one_file(run, tmp_path):
    write(tmp_path / "in.jsonl", good(2))
    file, _ = open_answers(tmp_path / "out.jsonl", {}, overwrite=False)
    for arguments in ([], ["--overwrite"]):
        with file_stays(tmp_path / "out.jsonl"), pytest.raises(LlavaError, match="is writing to"):
            run(*arguments)
    file.close()
    assert len(run()) == 2


@contextlib.contextmanager
def file_stays(path):
    before = path.read_bytes()
    yield
    assert path.read_bytes() == before


def test_answers_of_other_parameters_are_not_continued(run, tmp_path, monkeypatch):
    write(tmp_path / "in.jsonl", good(1))
    run()
    other = tiny_llava(seed=1)
    monkeypatch.setattr(model.Llava, "from_pretrained", lambda *_, **__: other)
    with pytest.raises(LlavaError, match="another run .different: parameters"):
        run()


def test_answers_of_another_run_are_not_continued(run, tmp_path):
    write(tmp_path / "in.jsonl", good(2))
    first = run("--sampling", '{"max_tokens": 4}')
    with pytest.raises(LlavaError, match="another run .different: sampling.*--overwrite"):
        run("--sampling", '{"max_tokens": 5}')
    write(tmp_path / "in.jsonl", good(3))
    with pytest.raises(LlavaError, match="different: input, sampling"):
        run()
    (tmp_path / "out.jsonl.run.json").write_text("[]")
    with pytest.raises(LlavaError, match="different: input, parameters"):
        run()
    assert len(run("--overwrite")) == 3 and len(first) == 2


def test_settings_of_the_command_line_give_way_to_the_requests(run, llava, tmp_path):
    requests = [
        {"prompt": "a?"},
        {"prompt": "a?", "max_new_tokens": 2},
        {"prompt": "a?", "n": 2, "temperature": 1.0, "logprobs": 1, "prompt_logprobs": 0},
    ]
    defaults = {"max_tokens": 3, "ignore_eos": True, "temperature": 2.0, "seed": 1}
    write(tmp_path / "in.jsonl", [*requests, {"prompt": "a?", "do_sample": False, "seed": 9}])
    lines = run("--sampling", json.dumps(defaults))
    greedy = llava.generate("a?", max_tokens=3, ignore_eos=True)
    assert lines.pop()["text"] == greedy != lines[0]["text"]
    assert [line["completion_tokens"] for line in lines] == [3, 2, 6]
    last = lines[2]
    assert len(last["texts"]) == 2 and last["texts"][0] == last["text"]
    assert [len(of_one) for of_one in last["logprobs"]] == [3, 3]
    assert set(last["logprobs"][0][0]) == {"token", "logprob", "top"}
    assert len(last["prompt_logprobs"]) == last["prompt_tokens"] - 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--input", "no/such.jsonl"], "no file of requests at no/such.jsonl"),
        (["--batch_size", "0"], "--batch_size must be at least 1"),
        (["--sampling", '{"top": 1}'], "unknown sampling parameter 'top'"),
        (["--checkpoint", "no/such/run"], "no checkpoint folder at no/such/run"),
        (["--image_root", "no/such"], "no folder of images at no/such"),
        (["--output", "."], "--output is a folder, .: give a file"),
    ],
)
def test_wrong_arguments_are_reported_at_the_start(run, tmp_path, arguments, message):
    write(tmp_path / "in.jsonl", good(1))
    with pytest.raises(LlavaError, match=message):
        run(*arguments)


def test_an_output_that_cannot_be_made_is_reported(run, tmp_path, capsys):
    write(tmp_path / "in.jsonl", [])
    (tmp_path / "file").write_text("")
    arguments = ["--input", f"{tmp_path}/in.jsonl", "--output", f"{tmp_path}/file/out.jsonl"]
    assert cli.main(["generate", "--checkpoint", str(tmp_path), *arguments]) == 1
    assert re.search(r"generate: cannot use .*file.*: ", capsys.readouterr().err)


@pytest.mark.parametrize("text", ["[]", "{max_tokens: 3}"])
def test_settings_that_are_not_a_json_object_are_refused(run, tmp_path, capsys, text):
    with pytest.raises(SystemExit):
        run("--sampling", text)
    assert f"argument --sampling: {text!r} is not" in capsys.readouterr().err
