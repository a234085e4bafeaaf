"""Data on the Hugging Face hub, hf://: the records and pictures of local files, and what fails."""

import pytest

from llava_jax.data import buckets, copies
from llava_jax.data.records import checked_record, open_records
from llava_jax.errors import LlavaError
from tests.data import same_records as same
from tests.data.hub_server import DATA_SET, HubServer
from tests.data.test_forms import assert_same, batches

fsspec = pytest.importorskip("fsspec")
huggingface_hub = pytest.importorskip("huggingface_hub")

URL = f"hf://datasets/{DATA_SET}"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub of this machine, an empty cache, and tries that follow at once."""
    with HubServer() as server:
        monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": server.address})
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setenv("LLAVA_JAX_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(buckets, "_WAITS", (0, 0))
        buckets._file_system.cache_clear()  # those of other tests know other servers
        yield server
    buckets._file_system.cache_clear()


@pytest.fixture
def local(tmp_path):
    """The same records as JSON with pictures and as two Parquet files that hold them."""
    folder = tmp_path / "local"
    same.write_json_and_parquet(folder)
    return folder


SOURCES = [("data.json", "images"), ("parquet", None), ("parquet/train-*.parquet", None)]


@pytest.mark.parametrize(("name", "root"), SOURCES)
def test_batches_are_those_of_local_files(name, root, local, hub):
    hub.upload(local)
    theirs = open_records(local / name, root and local / root)
    ours = open_records(f"{URL}/{name}", root and f"{URL}/{root}")
    assert ours.path == f"{URL}/{name}" and ours.fingerprint() == theirs.fingerprint()
    assert_same(batches(ours), batches(theirs))
    copied = {path.suffix for path in copies.cache_folder().rglob("*") if path.is_file()}
    assert copied == {".json" if root else ".parquet"}  # pictures are not kept


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("none.json", f"^no data file or data set at {URL}/none.json$"),
        ("none/train.parquet", f"^no data file or data set at {URL}/none/train.parquet$"),
        ("none-*.parquet", f"^no data file at {URL}/none-"),
        ("parquet", f"^{URL}/parquet holds no data set"),
    ],
)
def test_a_file_that_is_not_there(path, message, hub):
    hub.objects["parquet/readme.md"] = b""
    with pytest.raises(LlavaError, match=message):
        open_records(f"{URL}/{path}")


def test_a_data_set_that_is_not_there_or_not_public(hub):
    """The hub says the same of both."""
    url = "hf://datasets/owner/none/train.json"
    message = rf"^{url} may not be read \(RepositoryNotFoundError.*`hf auth login`, or set HF_TOKEN"
    with pytest.raises(LlavaError, match=message) as raised:
        open_records(url)
    assert "\n" not in str(raised.value) and hub.requests["info"] == 1


def test_a_missing_picture_is_a_fault_of_its_record(local, hub):
    hub.upload(local)
    del hub.objects["images/a/2.png"]
    records = open_records(f"{URL}/data.json", f"{URL}/images")
    checked_record(records, 1)
    with pytest.raises(LlavaError, match=f"record 2 .*no image file '{URL}/images/a/2.png'"):
        checked_record(records, 2)


def test_a_file_that_is_changed_is_copied_again(hub):
    """HfFileSystem keeps what it was told; a later start, and the end of a copy, ask anew."""
    first, second = (b'[{"id": "%d", "conversations": []}]' % number for number in (1, 2))
    hub.objects["data.json"] = first

    def change(request):
        if request == "read data.json":
            hub.objects["data.json"] = second

    hub.on_request = change
    with pytest.raises(LlavaError, match=f"{URL}/data.json was changed while it was copied"):
        open_records(f"{URL}/data.json")
    assert open_records(f"{URL}/data.json").item(0)["id"] == "2"
    hub.on_request = lambda request: None
    hub.objects["data.json"] = first
    assert open_records(f"{URL}/data.json").item(0)["id"] == "1"
