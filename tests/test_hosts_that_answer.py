"""Two processes of eval.py and of `llava-jax generate` on one folder, one of them killed."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tiny_model import random_image

ROOT = Path(__file__).parent.parent
QUESTIONS = 48
# Signs of life as often as a test needs them, then a script as if it had been started.
START = """
import runpy, sys
from llava_jax.parallel import shares
shares.BEAT, shares.SILENCE, shares.LATE = 0.1, float(sys.argv[1]), 1
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
SCRIPTS = {"eval": ["eval.py"], "generate": ["llava_jax/cli.py", "generate"]}


@pytest.fixture(scope="module")
def asked(tmp_path_factory) -> Path:
    """A folder with the questions of a benchmark and the same as a file of requests."""
    folder = tmp_path_factory.mktemp("asked")
    (folder / "images").mkdir()
    records, requests = [], []
    for i in range(QUESTIONS):
        random_image(i).save(folder / f"images/{i}.png")
        question = f"question {i:02d}?"
        turns = [
            {"from": "human", "value": f"<image>\n{question}"},
            {"from": "gpt", "value": "blue"},
        ]
        records.append({"id": f"q-{i}", "image": f"{i}.png", "conversations": turns,
                        "question": question, "answer": "blue", "kind": "color"})  # fmt: skip
        requests.append({"prompt": question, "image": f"images/{i}.png", "max_tokens": 24})
    (folder / "test.json").write_text(json.dumps(records))
    (folder / "blind.json").write_text(json.dumps({"test": {"overall": {"accuracy": 0.5}}}))
    (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in requests))
    return folder


def start(script: str, asked: Path, checkpoint: Path, out: Path, place=None, silence=60.0):
    """The command as process `place` of two, or by itself."""
    surroundings = os.environ | {
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests/without_torch'}",
    }
    if place is not None:
        surroundings |= {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(place)}
    if script == "eval":
        arguments = ["--config=configs/eval/easy_vqa.py", f"--config.data_root={asked}"]
        arguments += ["--config.options.split=test", "--config.batch_size=1"]
        arguments += ["--config.max_new_tokens=24", f"--output={out}"]
    else:
        arguments = ["--input", str(asked / "in.jsonl"), "--output", str(out / "out.jsonl")]
        arguments += ["--batch_size", "1"]
    command = [*SCRIPTS[script], "--checkpoint", str(checkpoint), *arguments]
    return subprocess.Popen(
        [sys.executable, "-c", START, str(silence), *command],
        cwd=ROOT, env=surroundings, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def end(*processes: subprocess.Popen) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each."""
    try:
        return [(p.communicate(timeout=300), p.returncode)[::-1] for p in processes]
    finally:
        for process in processes:
            process.kill()


RESULTS = {
    "eval": ["easy_vqa/test/predictions.jsonl", "easy_vqa/test/metrics.json", "report.md"],
    "generate": ["out.jsonl", "out.jsonl.run.json"],
}
PART = {
    "eval": "easy_vqa/test/shard-2-of-2/predictions.jsonl",
    "generate": "out.jsonl.shard-2-of-2",
}


@pytest.mark.parametrize("script", ["generate", pytest.param("eval", marks=pytest.mark.slow)])
def test_a_killed_process_loses_its_own_share_and_the_next_start_answers_it(
    script, asked, aligned, tmp_path
):
    one, two = tmp_path / "one", tmp_path / "two"
    ((code, (alone, err)),) = end(start(script, asked, aligned, one))
    assert code == 0, err
    first = start(script, asked, aligned, two, 0, silence=3)
    second = start(script, asked, aligned, two, 1)
    part = two / PART[script]
    while second.poll() is None and not (part.exists() and b"\n" in part.read_bytes()):
        time.sleep(0.002)
    second.kill()
    (code, (out, err)), (killed, _) = end(first, second)
    answered = part.read_bytes().count(b"\n")
    assert killed == -9 and 0 < answered < QUESTIONS // 2
    assert code == 1 and "Traceback" not in err
    what = {"eval": "questions of easy_vqa/test", "generate": "requests"}[script]
    missing = QUESTIONS // 2 - answered
    assert f"no answer yet to {missing} of {QUESTIONS} {what} (host 2 of 2 has shown no" in err
    assert "as many hosts or fewer" in err and SCRIPTS[script][0] in err.splitlines()[-1]
    assert not (two / RESULTS[script][0]).exists() and "accuracy" not in out
    before, copy = part.read_bytes(), tmp_path / "copy"
    shutil.copytree(two, copy)

    results = end(*(start(script, asked, aligned, two, place) for place in (0, 1)))
    assert [code for code, _ in results] == [0, 0], results
    (_, (out, err)), (_, (other_out, other_err)) = results
    assert out.replace(str(two), str(one)) == alone and other_out == ""
    share = f"host 2 of 2 answers {what} {QUESTIONS // 2 + 1} to {QUESTIONS} of {QUESTIONS}"
    assert other_err.strip().splitlines() == [share]
    for name in RESULTS[script]:
        assert (two / name).read_bytes() == (one / name).read_bytes()
    assert not list(two.glob("**/host-*.json"))
    if script == "eval":
        assert part.read_bytes().startswith(before)

    ((code, (out, _)),) = end(start(script, asked, aligned, copy))  # on one host
    assert code == 0 and out.replace(str(copy), str(one)) == alone
    for name in RESULTS[script]:
        assert (copy / name).read_bytes() == (one / name).read_bytes()
