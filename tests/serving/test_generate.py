"""`llava-jax generate`: order, errors among good requests, resuming, settings."""

import argparse
import base64
import contextlib
import json
import re

import jax
import pytest

from llava_jax import cli
from llava_jax.errors import LlavaError
from llava_jax.inference import model
from llava_jax.parallel import hosts, shares
from llava_jax.parallel.shares import Meeting, Shard
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
        if not (tmp_path / "out.jsonl").exists():  # a part of several was answered
            return []
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
    with pytest.raises(LlavaError, match="over 16 devices does not fit this host, which has 8: a"):
        run("--tensor", "16")


def test_a_model_that_does_not_fit_the_memory_is_refused(run, tmp_path, monkeypatch):
    def fail(text):
        def load(*_, **__):
            raise jax.errors.JaxRuntimeError(text)

        monkeypatch.setattr(model.Llava, "from_pretrained", load)

    write(tmp_path / "in.jsonl", good(1))
    fail("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 134217728 bytes")
    with pytest.raises(LlavaError, match="does not fit the memory .* 8 x cpu.*a copy cannot span"):
        run()
    fail("INTERNAL: another fault")
    with pytest.raises(jax.errors.JaxRuntimeError, match="another fault"):
        run()


def test_the_model_is_loaded_as_the_flags_say(run, llava, tmp_path, monkeypatch):
    write(tmp_path / "in.jsonl", good(1))
    loaded = []
    keep = lambda *_, **options: loaded.append(options) or llava
    monkeypatch.setattr(model.Llava, "from_pretrained", keep)
    words = ("--quantize", "int8", "--kv_cache", "int8", "--lookup", "3")
    words += ("--cache_tokens", "640")
    run(*words, "--template", "v1", "--dtype", "mixed")
    run("--weights", "int8", "--overwrite")  # the earlier name
    first, second = loaded
    assert (first["quantize"], first["kv_cache"], first["template"]) == ("int8", "int8", "v1")
    assert first["dtype"] == "mixed" and second["quantize"] == "int8"
    assert second["template"] is None and (first["lookup"], second["lookup"]) == (3, 0)
    assert (first["cache_tokens"], second["cache_tokens"]) == (640, None)


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
    file, _ = open_answers(tmp_path / "out.jsonl", {})
    for arguments in ([], ["--overwrite"]):
        with file_stays(tmp_path / "out.jsonl"), pytest.raises(LlavaError, match="is writing to"):
            run(*arguments)
    file.close()
    assert len(run()) == 2


@pytest.fixture
def run_host(run, monkeypatch):
    """Runs the command as one of several hosts, which finds the others gone already."""

    def command(index: int, count: int, *arguments) -> list[dict]:
        with monkeypatch.context() as change:
            change.setattr(hosts, "place", lambda: Shard(index, count))
            change.setattr(Meeting, "_watched", lambda *_: {})
            change.setattr(shares, "LATE", 0)
            return run(*arguments)

    return command


def test_hosts_answer_a_file_as_one_process_does(run, run_host, llava, tmp_path, capsys):
    requests = good(9)
    requests[4]["prompt"] = 5  # a wrong one
    requests[7]["id"] = requests[2]["id"] = None  # two with one id
    write(tmp_path / "in.jsonl", requests)
    out = tmp_path / "out.jsonl"
    run()
    whole = out.read_bytes()
    out.unlink()
    capsys.readouterr()
    asked = []
    for index in (3, 2, 1):
        before = llava.engine.counts.requests
        lines = run_host(index, 3)
        asked.append(llava.engine.counts.requests - before)
        err = capsys.readouterr().err
        assert f"host {index} of 3 answers requests {3 * index - 2} to {3 * index} of 9" in err
        assert (index == 1) == ("requests/s" in err) == ("wrong requests: 1;" in err)
        assert len(lines) == (9 if index == 1 else 0)
    assert asked == [3, 2, 3] and out.read_bytes() == whole
    assert not list(tmp_path.glob("out.jsonl.shard*"))


def test_what_a_killed_host_had_to_answer_is_answered_by_those_that_come(
    run, run_host, llava, tmp_path
):
    write(tmp_path / "in.jsonl", good(9))
    out, part = tmp_path / "out.jsonl", tmp_path / "out.jsonl.shard-2-of-3"
    run()
    whole = out.read_bytes()
    for others in (3, 2, 1):  # hosts of the second start
        out.unlink()
        run_host(3, 3)
        run_host(2, 3)
        part.write_bytes(part.read_bytes()[:-9])  # killed in the middle of its last line
        with pytest.raises(LlavaError, match="no answer yet to 1 of 9 requests .*as many hosts or"):
            run_host(1, 3)
        before, left = llava.engine.counts.requests, out.exists() and out.read_bytes()
        assert not left
        for index in range(others, 1, -1):
            run_host(index, others)
        assert len(run_host(1, others) if others > 1 else run()) == 9
        assert llava.engine.counts.requests - before == 1
        assert out.read_bytes() == whole and not part.exists()


def test_a_kill_while_parts_are_put_together_loses_nothing(run, run_host, llava, tmp_path):
    write(tmp_path / "in.jsonl", good(6))
    out = tmp_path / "out.jsonl"
    run()
    whole = out.read_bytes()
    for kept in (0, 1, whole.index(b"\n") + 1, len(whole) - 3, len(whole)):
        out.unlink()
        run_host(2, 2)
        with pytest.raises(LlavaError, match="no answer yet"):
            run_host(1, 3)  # stands for a host 1 that was killed after its share
        out.write_bytes(whole[:kept])
        assert len(run()) == 6 and out.read_bytes() == whole


def test_parts_of_another_run_are_neither_taken_nor_lost(run, run_host, tmp_path):
    write(tmp_path / "in.jsonl", good(4))
    run_host(2, 2, "--sampling", '{"max_tokens": 4}')
    part = tmp_path / "out.jsonl.shard-2-of-2"
    before = part.read_bytes()
    for command in (run, lambda: run_host(1, 2), lambda: run_host(2, 2)):
        with pytest.raises(LlavaError, match="shard-2-of-2 holds answers of another run"):
            command()
    assert part.read_bytes() == before
    assert len(run("--overwrite")) == 4 and not part.exists()


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
