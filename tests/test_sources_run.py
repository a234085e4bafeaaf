"""train.py on Parquet files and tars: the runs are those on the JSON file, killed or not."""

import json
import signal
import time

import pytest

from tests.data import same_records as same
from tests.data.bucket_server import BucketServer
from tests.test_train import read_lines
from tests.tiny_run import align, run_script, start_script

CHANGES = {"steps": 20, "save_every": 2, "validate_every": 3}


def converted(world, kind: str, folder) -> str:
    """The records of stage 1 in a file of another kind, which holds their pictures."""
    items, images = json.loads((world / "data/align.json").read_text()), world / "data/images"
    items = [item for item in items if (images / item["image"]).exists()]
    if kind == "parquet":
        rows = [item | {"image": same.as_structs(images, item | {"image": [item["image"]]})[0]}
                for item in items]  # fmt: skip
        return str(same.write_parquet(folder / "align.parquet", rows))
    samples = []
    for item in items:
        text = json.dumps({"conversations": item["conversations"]}).encode()
        picture = (images / item["image"]).read_bytes()
        samples.append((item["id"], {"png": picture, "json": text}))
    return str(same.write_tar(folder / "align.tar", samples))


def logged(workdir) -> list[dict]:
    timings = ("_per_second", "seconds")
    lines = read_lines(workdir / "metrics.jsonl")
    return [{k: v for k, v in line.items() if not k.endswith(timings)} for line in lines]


def killed_and_resumed(world, values: dict, workdir) -> str:
    """Kills a run once it has saved step 2, and starts it again; what that one wrote to stderr."""
    process = start_script(world, values)
    while process.poll() is None and not (workdir / "checkpoints/2").exists():
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL, process.stderr.read()
    code, _, err = run_script(world, values)
    assert code == 0 and "resuming from step" in err, err
    return err


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_a_killed_run_ends_as_the_run_on_json_does(world, tmp_path, kind):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    code, _, err = run_script(world, align(world, whole, CHANGES))
    assert code == 0, err
    values = align(world, killed, CHANGES | {"data.train": converted(world, kind, tmp_path)})
    killed_and_resumed(world, values, killed)
    assert logged(killed) == logged(whole)
    assert ("tar-" in str([*(killed / "cache").iterdir()])) == (kind == "tar")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["json", "tar"])
def test_a_killed_run_on_a_bucket_ends_as_the_run_on_local_files_does(
    world, tmp_path, monkeypatch, kind
):
    pytest.importorskip("gcsfs")
    whole, killed, local = tmp_path / "whole", tmp_path / "killed", tmp_path / "local"
    code, _, err = run_script(world, align(world, whole, CHANGES))
    assert code == 0, err
    with BucketServer() as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.address)
        monkeypatch.setenv("FSSPEC_GS_TOKEN", "anon")
        monkeypatch.setenv("LLAVA_JAX_CACHE", str(tmp_path / "cache"))
        server.upload(world / "data")
        places = {"data.train": "gs://bkt/align.json", "data.image_root": "gs://bkt/images"}
        if kind == "tar":
            converted(world, kind, local)
            server.upload(local)
            places = {"data.train": "gs://bkt/align.tar"}
        values = align(world, killed, CHANGES | places)
        err = killed_and_resumed(world, values, killed)
    assert "copying" not in err and logged(killed) == logged(whole)
