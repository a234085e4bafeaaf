"""The stage of Ray Data: its answers are those of `llava-jax generate`, whatever is killed."""

import argparse
import json
import os
import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from llava_jax.errors import LlavaError
from llava_jax.inference.model import Llava
from llava_jax.serving import command_line, generate
from llava_jax.serving.ray_data import COLUMNS, Answerer
from tests.ray_cluster import MEMORY, kill, node_of, ray_cluster
from tests.tiny_model import random_image, tiny_llava

SAMPLING = {"max_tokens": 12, "ignore_eos": True}


class Noted(Answerer):
    """Notes its process, and each batch that it has begun."""

    def __init__(self, notes: Path, **options):
        super().__init__(**options)
        self._notes, self._batches = notes, 0
        (notes / f"actor-{os.getpid()}").touch()

    def __call__(self, rows: pa.Table) -> pa.Table:
        time.sleep(0.3)  # so that there is something to kill
        self._batches += 1
        (self._notes / f"batch-{os.getpid()}-{self._batches}").touch()
        return super().__call__(rows)


def rows_of(folder: Path, count: int) -> list[dict]:
    """Questions, some with a picture in one of its forms, some that cannot be answered."""
    pictures = {}
    for i in range(3):
        random_image(i).save(folder / f"{i}.png")
        pictures[i] = (folder / f"{i}.png").read_bytes()
    rows = []
    for i in range(count):
        image = [
            None,
            {"bytes": None, "path": f"{i % 3}.png"},
            {"bytes": pictures[i % 3], "path": None},
        ][i % 3]
        if i % 10 == 7:
            image = {"bytes": b"\x89PNG broken", "path": None}
        rows.append({"key": f"k{i}", "prompt": f"{i}?", "image": image, "seed": i, "label": i * i})
    return rows


@pytest.fixture
def answerer(tmp_path, monkeypatch):
    """answerer(**options): the stage with a tiny model."""
    llava = tiny_llava()
    monkeypatch.setattr(Llava, "from_pretrained", lambda *_, **__: llava)
    monkeypatch.setattr(command_line, "keep_compilations", lambda: None)
    options = {"checkpoint": tmp_path, "image_root": tmp_path, "batch_size": 4}
    return lambda **more: Answerer(**options | more)


def generated(folder: Path, rows: list[dict], checkpoint: Path) -> list[dict]:
    """The lines of `llava-jax generate` for the same requests."""
    lines = []
    for row in rows:
        line = {"id": row["key"], "prompt": row["prompt"], "seed": row["seed"]}
        if row["image"] is not None:
            path = folder / f"{row['key']}.bin"
            path.write_bytes(row["image"]["bytes"] or (folder / row["image"]["path"]).read_bytes())
            line["image"] = path.name
        lines.append(json.dumps(line) + "\n")
    (folder / "in.jsonl").write_text("".join(lines))
    parser = argparse.ArgumentParser()
    generate.add_arguments(parser)
    words = ["--checkpoint", checkpoint, "--input", folder / "in.jsonl", "--output"]
    words += [folder / "out.jsonl", "--batch_size", 4, "--sampling", json.dumps(SAMPLING)]
    words += ["--template", "chatml"]
    assert generate.main(parser.parse_args([str(word) for word in words])) == 0
    return [json.loads(line) for line in open(folder / "out.jsonl", encoding="utf-8")]


def check_same(answers: list[dict], lines: list[dict], rows: list[dict]) -> None:
    """Rows as they were, each once, with the answers of the lines."""
    assert [{key: row[key] for key in rows[0]} for row in answers] == rows
    for row, line in zip(answers, lines, strict=True):
        assert ("error" in line) == (row["error"] is not None)
        if "error" not in line:
            assert {name: row[name] for name in COLUMNS if name != "error"} == {
                name: line[name] for name in COLUMNS if name != "error"
            }
    assert sum(row["error"] is not None for row in answers) == len(rows) // 10


def test_rows_keep_their_columns_and_get_the_answers_of_generate(answerer, tmp_path):
    rows = rows_of(tmp_path, 20)
    stage = answerer(sampling=SAMPLING)
    batches = [pa.Table.from_pylist(rows[i : i + 7]) for i in (0, 7, 14)]
    answers = pa.concat_tables(map(stage, batches)).to_pylist()
    check_same(answers, generated(tmp_path, rows, tmp_path), rows)
    assert len({row["text"] for row in answers}) > 10


def test_a_row_that_is_wrong_has_an_error_alone(answerer):
    rows = [
        {"prompt": "a", "image": ["no.png"], "top_p": None},
        {"prompt": "a", "image": None, "top_p": 2.0},
        {"prompt": None, "image": None, "top_p": None},
        {"prompt": "a", "image": [b"GIF", "http://localhost/a.png"], "top_p": None},
        {"prompt": "a", "image": None, "top_p": 0.5},
    ]
    rows[0]["image"], rows[3]["image"] = [b"no"], [b"GIF", b"PNG"]
    answers = answerer(sampling={"max_tokens": 2})(pa.Table.from_pylist(rows)).to_pylist()
    errors = [row["error"] for row in answers]
    words = ["image", "top_p must be", "a text 'prompt'", "image"]
    assert all(word in error for word, error in zip(words, errors, strict=False))
    assert errors[4] is None and answers[4]["completion_tokens"] >= 1
    assert all(row["text"] is row["prompt_tokens"] is None for row in answers[:4])


def test_the_prompt_of_rows_that_have_none(answerer):
    rows = pa.table({"key": ["a", "b"], "prompt": [None, "Other?"]})
    asked = answerer(prompt="What?", sampling=SAMPLING)(rows)["text"].to_pylist()
    model = tiny_llava()
    assert asked == model.generate(["What?", "Other?"], **SAMPLING)


def test_columns_that_are_asked_for(answerer):
    sampling = {"n": 2, "temperature": 1.0, "logprobs": 1, "max_tokens": 3, "ignore_eos": True}
    table = pa.table({"prompt": ["a", "b"], "n": ["one", "two"]})  # n of the rows is no request's
    (first, second) = answerer(sampling=sampling)(table).to_pylist()
    assert (first["n"], second["n"]) == ("one", "two") and len(first["texts"]) == 2
    assert len(json.loads(first["logprobs"])[1]) == 3 and "prompt_logprobs" not in first


@pytest.mark.parametrize(
    "options, words",
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"sampling": {"temprature": 1}}, "did you mean temperature"),
        ({"dtipe": "float32"}, "no argument 'dtipe' .did you mean 'dtype'"),
        ({"dtype": "float5"}, "argument --dtype: invalid choice: 'float5'"),
        ({"allow_urls": "maybe"}, "allow_urls must be true or false"),
    ],
)
def test_options_that_are_wrong(answerer, options, words):
    with pytest.raises(LlavaError, match=words):
        answerer(**options)


def test_tables_that_are_wrong(answerer):
    stage = answerer()
    with pytest.raises(LlavaError, match="already: rename it first"):
        stage(pa.table({"prompt": ["a"], "text": ["b"]}))
    with pytest.raises(LlavaError, match='batch_format="pyarrow"'):
        stage({"prompt": ["a"]})


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["actor", "node"])
def test_a_worker_is_killed(victim, aligned, tmp_path):
    """A process that answers, or a machine with all its processes: nothing is lost, or twice."""
    pytest.importorskip("ray", reason="needs the ray extra")
    import ray

    rows, notes = rows_of(tmp_path, 60), tmp_path / "notes"
    notes.mkdir()
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    options = {"checkpoint": aligned, "image_root": tmp_path, "batch_size": 4}
    options |= {"template": "chatml", "sampling": SAMPLING, "notes": notes}
    with ray_cluster(3) as cluster:
        data = ray.data.read_parquet(str(tmp_path / "rows.parquet")).repartition(15)
        data = data.map_batches(
            Noted,
            fn_constructor_kwargs=options,
            compute=ray.data.ActorPoolStrategy(size=2),
            batch_format="pyarrow",
            batch_size=4,
        )
        work = threading.Thread(target=data.write_parquet, args=[str(tmp_path / "answers")])
        work.start()
        while len(list(notes.glob("batch-*"))) < 4:
            assert work.is_alive()
            time.sleep(0.05)
        pids = [int(path.name.split("-")[1]) for path in notes.glob("batch-*-1")]
        if victim == "actor":
            kill(pids[0])
        else:
            (node, *_) = filter(None, (node_of(cluster, pid) for pid in pids))
            cluster.remove_node(node, allow_graceful=False)
            cluster.add_node(num_cpus=1, object_store_memory=MEMORY)
        work.join()
    answers = pa.parquet.read_table(tmp_path / "answers").to_pylist()
    answers.sort(key=lambda row: int(row["key"][1:]))
    check_same(answers, generated(tmp_path, rows, aligned), rows)
    assert len(list(notes.glob("actor-*"))) > 2  # one was replaced
