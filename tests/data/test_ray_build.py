"""`llava-jax build --ray`: the set of a single process, whatever happens to the workers."""

import argparse
import os
import signal
from pathlib import Path

import pytest
from tensorflow_datasets.core.utils.shard_utils import ShardConfig

from llava_jax.data import build
from llava_jax.data.build import build_data_set
from llava_jax.errors import LlavaError
from tests.ray_cluster import ray_cluster


class Deadly:
    """Records of which some kill the process that reads them: at their first and third reading.

    The first is in a check, and the third while a shard is being written.
    """

    def __init__(self, records, folder: Path, indexes: set[int]):
        self._records, self._folder, self._indexes = records, folder, indexes
        self.path, self.image_root = records.path, records.image_root

    def __getitem__(self, index: int):
        if index in self._indexes:
            readings = len(list(self._folder.glob(f"{index}-*"))) + 1
            (self._folder / f"{index}-{readings}").touch()
            if readings in (1, 3):
                os.kill(os.getpid(), signal.SIGKILL)
        return self._records[index]


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.slow
def test_killed_workers_change_nothing(data_set, tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="needs the ray extra")
    from llava_jax.data.ray_build import Cluster

    monkeypatch.setattr(ShardConfig, "min_shard_size", 1)  # several shards of the few records
    monkeypatch.setattr(build, "PART", 5)
    path, root = data_set
    alone = build_data_set(path, root, tmp_path / "alone", "shapes", progress=False)
    readings = tmp_path / "readings"
    readings.mkdir()
    with ray_cluster(2):
        cluster = Cluster("auto")
        deadly = lambda function, records, parts: cluster(
            function, Deadly(records, readings, {3, 11}), parts
        )
        folder = build_data_set(
            path, root, tmp_path / "many", "shapes", progress=False, workers=deadly
        )
        # A fault of the data is one sentence, and nobody tries again.
        (root / "a/9.png").unlink()
        with pytest.raises(LlavaError, match="data.json: record 9 .*9.png"):
            build_data_set(path, root, tmp_path / "no", "shapes", progress=False, workers=cluster)
    assert sorted(int(file.name.split("-")[0]) for file in readings.iterdir()) == [3] * 4 + [11] * 4
    assert len(list(folder.glob("*array_record*"))) == 16
    assert files(folder) == files(alone)
    assert not list((tmp_path / "many").glob(".*"))


def test_without_ray_the_flag_says_what_to_install(data_set, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    parser = argparse.ArgumentParser()
    build.add_arguments(parser)
    path, root = data_set
    words = [str(path), "--out", str(tmp_path / "out"), "--name", "a", "--ray", "auto"]
    with pytest.raises(LlavaError, match=r"ray is not installed: pip install 'llava_jax\[ray\]'"):
        build.main(parser.parse_args(words))
