"""Data in a bucket: the records and pictures of local files, copies, and what a store may do."""

import functools
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from llava_jax.data import buckets, copies
from llava_jax.data.build import build_data_set
from llava_jax.data.pipeline import TrainingData
from llava_jax.data.records import holds_images, open_records
from llava_jax.errors import LlavaError
from tests.data import same_records as same
from tests.data.bucket_server import BucketServer
from tests.data.test_forms import assert_same, batches
from tests.data.test_tiles import FORMAT
from tests.tiny_model import byte_tokenizer

fsspec = pytest.importorskip("fsspec")
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # as `buckets` has it
gcsfs = pytest.importorskip("gcsfs")


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """A bucket gs://bkt of this machine, an empty cache, and tries that follow at once."""
    with BucketServer() as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.address)
        monkeypatch.setenv("LLAVA_JAX_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("FSSPEC_GS_TOKEN", "anon")  # for other processes
        monkeypatch.setitem(fsspec.config.conf, "gs", {"token": "anon"})
        monkeypatch.setattr(buckets, "_WAITS", (0, 0))
        monkeypatch.setattr("gcsfs.retry.min", lambda *_: 0, raising=False)
        buckets._file_system.cache_clear()  # those of other tests know other servers
        yield server
    buckets._file_system.cache_clear()


@pytest.fixture
def local(tmp_path):
    """The same records as JSON with pictures, Parquet, tars, ArrayRecord and a mixture of them."""
    folder = tmp_path / "local"
    items = same.write_json_and_parquet(folder)
    samples = []
    for i, item in enumerate(items):
        pictures = {f"{n}.png": (folder / "images" / name).read_bytes()
                    for n, name in enumerate(item["image"] or ())}  # fmt: skip
        record = {key: value for key, value in item.items() if key != "image"}
        samples.append((f"{i:03}", pictures | {"json": json.dumps(record).encode()}))
    same.write_tar(folder / "tars/000.tar", samples[:5])
    same.write_tar(folder / "tars/001.tar", samples[5:])
    build_data_set(folder / "data.json", folder / "images", folder / "sets", "a", progress=False)
    mixture = """
datasets:
  - {json_path: data.json, image_root: images, sampling_strategy: "random:6"}
  - {path: "tars/{000..001}.tar", repeat: 2}
  - {path: parquet, sampling_strategy: "end:3"}
  - {path: sets}
"""
    (folder / "mix.yaml").write_text(mixture)
    return folder


SOURCES = {
    "json": ("data.json", "images"),
    "parquet": ("parquet", None),
    "parquet pattern": ("parquet/train-*.parquet", None),
    "tars": ("tars/{000..001}.tar", None),
    "tar folder": ("tars", None),
    "array records": ("sets", None),
    "mixture": ("mix.yaml", None),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_batches_are_those_of_local_files(kind, local, bucket):
    name, root = SOURCES[kind]
    bucket.upload(local, "my data/")
    url = "gs://bkt/my data"
    theirs = open_records(local / name, root and local / root)
    ours = open_records(f"{url}/{name}", root and f"{url}/{root}")
    assert ours.path == f"{url}/{name}" and ours.fingerprint() == theirs.fingerprint()
    assert_same(batches(ours), batches(theirs))
    copied = {p.name for p in copies.cache_folder().rglob("*") if p.is_file()}
    assert not any(name.endswith(".png") for name in copied)  # pictures are not kept


def test_a_local_mixture_names_a_bucket_and_a_bucket_holds_pictures_of_a_local_file(local, bucket):
    bucket.upload(local)
    (local / "mix2.yaml").write_text(
        "datasets:\n  - json_path: data.json\n    image_root: gs://bkt/images\n"
        "  - path: gs://bkt/parquet\n"
    )
    (local / "mix1.yaml").write_text(
        "datasets:\n  - json_path: data.json\n    image_root: images\n  - path: parquet\n"
    )
    ours, theirs = (open_records(local / name) for name in ("mix2.yaml", "mix1.yaml"))
    assert_same(batches(ours), batches(theirs))


def training_data(path, root, **options) -> TrainingData:
    records = open_records(path, root, cache_dir=options.get("cache_dir"))
    options = {"batch_size": 1, "epochs": 1, "progress": False, "seed": 1} | options
    return TrainingData(records, byte_tokenizer(), FORMAT, **options)


def test_worker_processes_read_pictures_and_ask_for_nothing_else(local, bucket):
    bucket.upload(local)
    theirs = batches(open_records(local / "data.json", local / "images"))
    data = training_data("gs://bkt/data.json", "gs://bkt/images", workers=2)
    bucket.requests.clear()
    found = [batch.arrays | {"ids": batch.record_ids} for batch in data.batch_iterator()]
    assert_same(found, theirs)
    assert {request.split()[0] for request in bucket.requests} == {"read"}


def test_a_second_start_copies_nothing_and_reads_no_picture(local, bucket, tmp_path):
    bucket.upload(local)
    measured = tmp_path / "measured"

    def start():
        bucket.requests.clear()
        training_data("gs://bkt/data.json", "gs://bkt/images", cache_dir=measured)
        return {request for request in bucket.requests if request.startswith("read images")}

    assert start()
    assert start() == set()
    shutil.rmtree(copies.cache_folder())  # what is known hangs on objects, not on their copies
    assert start() == set()
    bucket.objects["images/a/1.png"] = bucket.objects["images/a/2.png"]
    assert "read images/a/1.png" in start()


def test_a_copy_is_made_anew_when_its_object_or_the_copy_has_changed(bucket, capfd):
    url = buckets.Url("gs://bkt/a/train.json")
    bucket.objects["a/train.json"] = b"[1]"
    (path,) = copies.local([url])
    assert path.read_bytes() == b"[1]" and path.parts[-3:] == ("bkt", "a", "train.json")
    assert "copying gs://bkt/a/train.json, 0.0 MB, to" in capfd.readouterr().err
    copies.local([url])
    assert bucket.requests["read a/train.json"] == 1
    bucket.objects["a/train.json"] = b"[2]"  # as large as before
    copies.local([url])
    assert path.read_bytes() == b"[2]"
    assert "gs://bkt/a/train.json is not what it was" in capfd.readouterr().err
    path.write_bytes(b"[3]")
    copies.local([url])
    assert path.read_bytes() == b"[2]"


def test_a_copy_comes_in_blocks(bucket, monkeypatch):
    monkeypatch.setattr(copies, "_BLOCK", 7)
    bucket.objects["x.tar"] = bytes(range(100))
    failed = []

    def third_block_is_cut(request):
        if request == "read x.tar" and bucket.requests[request] == 3:
            failed.append(request)
            return "cut"

    bucket.fault = third_block_is_cut
    (path,) = copies.local([buckets.Url("gs://bkt/x.tar")])
    assert path.read_bytes() == bytes(range(100)) and failed
    assert bucket.requests["read x.tar"] == 16  # 15 blocks, one of them twice
    assert [p.name for p in path.parent.iterdir()] == ["x.tar"]


FAULTS = {
    "cut": "cannot be read, after 3 tries: ClientPayloadError",
    "short": "cannot be read, after 3 tries: OSError: 2 bytes came in place of 3",
    503: "cannot be read, after 3 tries: HttpError",
    403: "may not be read .*gcloud auth application-default login",
    401: "may not be read .*gcloud auth application-default login",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_store_may_do(fault, bucket):
    bucket.objects["train.json"] = b"[1]"
    bucket.fault = lambda request: fault if request.startswith("read") else None
    with pytest.raises(LlavaError, match=f"^gs://bkt/train.json {FAULTS[fault]}") as raised:
        open_records("gs://bkt/train.json")
    assert "\n" not in str(raised.value)
    assert not [p for p in copies.cache_folder().rglob("*") if p.is_file()]


def test_an_object_that_changes_while_it_is_copied(bucket, monkeypatch):
    monkeypatch.setattr(copies, "_BLOCK", 2)
    bucket.objects["train.json"] = b"[1, 2]"

    def change(request):
        if bucket.requests["read train.json"] == 2:
            bucket.objects["train.json"] = b"[3, 4]"

    bucket.fault = change
    with pytest.raises(LlavaError, match="gs://bkt/train.json was changed while it was copied"):
        open_records("gs://bkt/train.json")
    bucket.fault = lambda request: None
    assert len(open_records("gs://bkt/train.json")) == 2


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("gs://bkt/none.json", "no data file or data set at gs://bkt/none.json"),
        ("gs://nobody/train.json", "no data file or data set at gs://nobody/train.json"),
        ("gs://bkt/t-*.parquet", "no data file at gs://bkt/t-"),
        ("gs://bkt/{0..1}.tar", "no data file at gs://bkt/0.tar, of the pattern"),
        ("gs://bkt/empty", "gs://bkt/empty holds no data set"),
        ("gs://bkt/../train.json", "leads out of a folder"),
        ("abfs://bkt/train.json", "abfs://bkt/train.json cannot be read: give a path, or a URL"),
    ],
)
def test_what_is_not_there(path, message, bucket):
    bucket.objects["empty/readme.md"] = b""
    with pytest.raises(LlavaError, match=message):
        open_records(path)


def test_a_missing_picture_is_a_fault_of_its_record(local, bucket):
    bucket.upload(local)
    del bucket.objects["images/a/2.png"]
    records = open_records("gs://bkt/data.json", "gs://bkt/images")
    from llava_jax.data.records import checked_record

    checked_record(records, 1)
    message = "gs://bkt/data.json: record 2 .*no image file 'gs://bkt/images/a/2.png'"
    with pytest.raises(LlavaError, match=message):
        checked_record(records, 2)
    with pytest.raises(LlavaError, match="the image root gs://bkt/nothing is not a folder"):
        open_records("gs://bkt/data.json", "gs://bkt/nothing")


def test_a_store_that_fails_is_no_bad_image(local, bucket):
    """Nothing is left out for it, even where bad images are."""
    bucket.upload(local)
    bucket.fault = lambda request: 503 if request == "read images/a/2.png" else None
    policy = {"bad_image": "skip", "bad_image_ceiling": 5}
    with pytest.raises(LlavaError, match="gs://bkt/images/a/2.png cannot be read, after"):
        training_data("gs://bkt/data.json", "gs://bkt/images", **policy)


def test_a_disk_that_is_too_small(bucket, monkeypatch):
    bucket.objects["train.json"] = b"[1]"
    usage = shutil.disk_usage("/")._replace(free=2)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(LlavaError, match="do not fit into .*LLAVA_JAX_CACHE"):
        open_records("gs://bkt/train.json")


def test_a_missing_package_is_named():
    code = (
        "import sys\nsys.modules['gcsfs'] = None\n"
        "from llava_jax.data.records import open_records\nopen_records('gs://bkt/train.json')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    message = "gs://bkt/train.json needs packages that are not installed: pip install"
    assert f"{message} 'llava_jax[buckets]'" in done.stderr


def _copy_in_a_process(name):
    code = (
        "from llava_jax.data import buckets, copies\n"
        f"print(copies.local([buckets.Url({name!r})])[0].read_bytes().count(b'x'))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=os.environ.copy()
    )


def test_of_two_processes_one_copies_and_the_other_waits(bucket):
    bucket.objects["x.tar"] = b"x" * (1 << 20)
    started = multiprocessing.Event()

    def slow(request):
        if request == "read x.tar":
            started.wait(1)

    bucket.fault = slow
    processes = [_copy_in_a_process("gs://bkt/x.tar") for _ in range(2)]
    assert [p.communicate(timeout=120)[0].strip() for p in processes] == ["1048576"] * 2
    assert bucket.requests["read x.tar"] == 1


def test_what_a_killed_process_leaves_is_removed(bucket):
    bucket.objects["d/x.tar"] = b"x"
    left = copies.copy_path("gs://bkt/d/x.tar.1.partial")
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    copies.local([buckets.Url("gs://bkt/d/x.tar")])
    assert [p.name for p in left.parent.iterdir()] == ["x.tar"]


def test_urls_are_paths_with_two_slashes():
    url = buckets.place("gs://bucket/data/train-0.parquet")
    assert str(url) == "gs://bucket/data/train-0.parquet" and url.suffix == ".parquet"
    assert str(url.parent / "b") == "gs://bucket/data/b"
    assert str(url.relative_to(url.parent)) == "train-0.parquet"
    assert buckets.below(url.parent, "hf://datasets/a/b") == buckets.Url("hf://datasets/a/b")
    assert buckets.below(url.parent, "/a") == Path("/a")
    assert buckets.below(Path("/d"), "a") == Path("/d/a")
    assert not holds_images(Path("nothing"))


def test_s3(local, monkeypatch, tmp_path):
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1",
        "LLAVA_JAX_CACHE": str(tmp_path / "cache"),
    }  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    buckets._file_system.cache_clear()
    try:
        store = fsspec.filesystem("s3")
        store.mkdir("bkt")
        store.put(str(local), "bkt/d", recursive=True)
        for name, root in (SOURCES[kind] for kind in ("json", "parquet pattern", "mixture")):
            ours = open_records(f"s3://bkt/d/{name}", root and f"s3://bkt/d/{root}")
            theirs = open_records(local / name, root and local / root)
            assert_same(batches(ours), batches(theirs))
        url = "s3://bkt/d/images/a/1.png"
        assert buckets.LISTINGS.find(url) == buckets.find(url) and buckets.find(url).tag
        for missing in ("s3://bkt/none.json", "s3://nobody/none.json"):
            with pytest.raises(LlavaError, match=f"no data file or data set at {missing}"):
                open_records(missing)
    finally:
        server.stop()
        buckets._file_system.cache_clear()


def test_a_web_server(local, monkeypatch, tmp_path):
    pytest.importorskip("aiohttp")
    monkeypatch.setenv("LLAVA_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(buckets, "_WAITS", (0, 0))
    handler = functools.partial(SimpleHTTPRequestHandler, directory=local)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        for name, root in (SOURCES[kind] for kind in ("json", "tars")):
            ours = open_records(f"{url}/{name}", root and f"{url}/{root}")
            theirs = open_records(local / name, root and local / root)
            assert_same(batches(ours), batches(theirs))
        for name in ("none.json", "{0..1}.tar", "tars/*.tar"):
            with pytest.raises(LlavaError, match=re.escape(url)):
                open_records(f"{url}/{name}")
        server.shutdown()
