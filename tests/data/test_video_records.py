"""Records with videos: rows, budgets, times, broken files, data sets."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from llava_jax.data.build import build_data_set
from llava_jax.data.pipeline import TrainingData
from llava_jax.data.records import checked_record, open_records
from llava_jax.data.rows import RowFormat
from llava_jax.data.show import as_text, show
from llava_jax.data.validate import validate
from llava_jax.data.video import Video
from llava_jax.errors import LlavaError, RecordError
from llava_jax.models.anyres import Tiling
from llava_jax.models.images import ImageSpec
from llava_jax.models.video import VideoSpec
from llava_jax.text.templates import get_template
from tests.data.conftest import record
from tests.tiny_model import byte_tokenizer
from tests.videos import frame, number_of, write_video

# Tiles of 28 pixels with 4 features each, of which a frame keeps one.
SPEC = ImageSpec(28, "resize", video=VideoSpec(frames=5))
FORMAT = RowFormat(get_template("chatml"), SPEC, tokens_per_tile=4, max_length=400, tiles=8)
TIMED = dataclasses.replace(SPEC, video=VideoSpec(frames=2, time_instruction=True))


def folder_of_frames(path, frames=12):
    path.mkdir()
    for number in range(frames):
        frame(number).save(path / f"{number}.png")


@pytest.fixture
def root(tmp_path):
    folder_of_frames(tmp_path / "frames")
    frame(30).save(tmp_path / "a.png")
    return tmp_path


def records(root, *items):
    (root / "data.json").write_text(json.dumps(items))
    return open_records(root / "data.json")


def video(record_id="v", question="<image>\nWhat?", **fields):
    return record(record_id, question) | {"video": "frames"} | fields


def data_of(found, **changes) -> TrainingData:
    options = {"batch_size": 1, "epochs": 1, "progress": False, "pad_final_batch": True}
    names = {field.name for field in dataclasses.fields(RowFormat)}
    row_format = {k: changes.pop(k) for k in list(changes) if k in names}
    row_format = dataclasses.replace(FORMAT, **row_format)
    return TrainingData(found, byte_tokenizer(), row_format, **options, **changes)


@pytest.mark.parametrize("mark", ["<image>", "<video>"])
def test_a_row_holds_the_frames_and_the_tokens_of_a_video(root, mark):
    (batch,) = data_of(records(root, video(question=f"{mark}\nWhat?"))).batch_iterator()
    tiles, ids = batch.arrays["tiles"][0], batch.arrays["feature_ids"][0]
    assert [number_of(tile) for tile in tiles[:5]] == [0, 2, 5, 8, 11] and not tiles[5:].any()
    (places,) = np.nonzero(batch.arrays["input_ids"][0] == -200)
    assert len(places) == 5 + 1  # a token a frame, and the newline
    assert ids[places, 0].tolist() == [0, 4, 8, 12, 16, -2]
    np.testing.assert_allclose(batch.arrays["feature_weights"][0][places[:5]], 0.25)


def test_images_and_videos_of_a_record_stand_where_they_are_written(root):
    both = video(question="<video> or <image>, and <video>?", image="a.png")
    both |= {"video": ["frames", "more"]}
    folder_of_frames(root / "more", 1)
    found = records(root, both)
    sources = checked_record(found, 0).images
    assert [isinstance(source, Video) for source in sources] == [True, False, True]
    assert found[0].turns[0].text == "<image> or <image>, and <image>?"
    (batch,) = data_of(found).batch_iterator()
    numbers = [number_of(tile) for tile in batch.arrays["tiles"][0][:7]]
    assert numbers == [0, 2, 5, 8, 11, 30, 0]


def test_videos_fill_the_budget_of_tiles(root):
    found = records(root, *[video(f"v{i}") for i in range(3)], record("text", "Hi?"))
    data = data_of(found)
    assert data.tiles_per_epoch == 15 and data.rows_per_epoch == 3
    data = data_of(found, tiles=4)
    assert data.records_used == 1
    assert "3 refused: more tiles than images_per_row=4" in data.describe()


@pytest.mark.parametrize("fps, frames, shown", [(1, 0, 6), (2, 0, 12), (2, 3, 3), (0, 12, 12)])
def test_sampling_decides_the_tiles_of_a_row(root, fps, frames, shown):
    spec = dataclasses.replace(SPEC, video=VideoSpec(frames=frames, fps=fps))
    data = data_of(records(root, video()), image=spec, tiles=12)
    assert data.tiles_per_epoch == shown


def test_lengths_are_measured_anew_for_another_sampling(root, tmp_path):
    found = records(root, video())
    of = lambda frames: data_of(
        found,
        image=dataclasses.replace(SPEC, video=VideoSpec(frames=frames)),
        cache_dir=tmp_path / "cache",
    )
    assert [of(3).tokens_per_epoch - of(2).tokens_per_epoch, of(2).tiles_per_epoch] == [1, 2]


def test_frames_that_changed_are_measured_anew(root, tmp_path):
    found = records(root, video())
    of = lambda: data_of(found, cache_dir=tmp_path / "cache").tiles_per_epoch
    assert of() == 5 == of()
    for number in range(3, 12):
        (root / f"frames/{number}.png").unlink()
    assert of() == 3


def test_a_model_may_read_the_times_of_the_frames(root):
    found = records(root, video(question="What?\n<image>"))
    data = data_of(found, image=TIMED)
    (batch,) = data.batch_iterator()
    length = int((batch.arrays["segment_ids"] == 1).sum())
    assert data.tokens_per_epoch == length
    shown = show(found, 0, dataclasses.replace(FORMAT, image=TIMED), byte_tokenizer())
    assert len(shown["input_ids"]) == length
    assert (
        "<image>\nThe video lasts for 6.00 seconds, and 2 frames are uniformly sampled from it. "
        "These frames are located at 0.00s,5.50s.Please answer the following questions related to "
        "this video.\nWhat?<|im_end|>"
    ) in shown["text"]
    with pytest.raises(LlavaError, match="set data.turns=conversation"):
        data_of(found, image=TIMED, turns="independent")


def test_show_names_size_and_frames(root):
    text = as_text(show(records(root, video()), 0, FORMAT, byte_tokenizer()), colour=False)
    assert "image 0: frames, 64x48 pixels, 5 frames, 5 tile(s), in tokens" in text


def test_a_model_without_videos_refuses_them_by_name(root):
    with pytest.raises(LlavaError, match="record 0 .*takes pictures, not videos"):
        data_of(records(root, video()), image=dataclasses.replace(SPEC, video=None))


def test_missing_videos_and_empty_folders(root):
    found = records(root, video(), video(video="none.mp4"), video(video="empty"))
    (root / "empty").mkdir()
    with pytest.raises(RecordError, match="record 1 .*no video file"):
        data_of(found)
    data = data_of(found, bad_image="skip", bad_image_ceiling=2)
    assert data.records_used == 1 and len(data.bad_images) == 2
    assert "holds no frames" in data.bad_images[1]


def test_a_link_out_of_the_root(root, tmp_path_factory):
    folder_of_frames(tmp_path_factory.mktemp("elsewhere") / "x")
    target = tmp_path_factory.mktemp("other")
    frame(0).save(target / "0.png")
    (root / "link").symlink_to(target)
    with pytest.raises(RecordError, match="outside the image root"):
        data_of(records(root, video(video="link")))


class TestFiles:
    @pytest.fixture(autouse=True)
    def av(self):
        pytest.importorskip("av", reason="PyAV (llava_jax[video]) is not installed")

    @pytest.fixture
    def files(self, root):
        write_video(root / "good.mp4", 20, container={"movflags": "faststart"})
        data = (root / "good.mp4").read_bytes()
        (root / "cut.mp4").write_bytes(data[: len(data) // 2])
        middle = len(data) - 3000
        (root / "damaged.mp4").write_bytes(data[:middle] + b"\0" * 500 + data[middle + 500 :])
        return root

    def test_training_and_validate_refuse_the_same(self, files):
        items = [video(name, video=f"{name}.mp4") for name in ("good", "cut", "damaged")]
        for chosen in ([0], [0, 1], [0, 2], [0, 1, 2]):
            found = records(files, *[items[i] for i in chosen])
            report = validate(found, FORMAT, byte_tokenizer(), progress=False, threads=2)
            try:
                [*data_of(found).batch_iterator()]
                refused = False
            except LlavaError as error:
                refused = True
                assert "broken or cut off" in str(error)
            assert refused == bool(report.faults) == (len(chosen) > 1)

    def test_a_broken_video_is_left_out_like_a_bad_image(self, files):
        items = [video(name, video=f"{name}.mp4") for name in ("good", "cut", "damaged")]
        data = data_of(records(files, *items), bad_image="skip", bad_image_ceiling=2)
        assert len(data.bad_images) == 1  # the one that is cut off: damage shows when decoding
        batches = [*data.batch_iterator()]
        assert [r for batch in batches for r in batch.record_ids] == ["good"]
        assert [name for batch in batches for name in batch.skipped] == ["record 2 (id 'damaged')"]

    def test_a_built_set_gives_the_same_rows(self, files, tmp_path):
        items = [video("one", video="good.mp4"), record("text", "Hi?")]
        items += [video("two", "<video> <image>?", video="good.mp4", image="a.png")]
        found = records(files, *items)
        build_data_set(found.path, None, tmp_path / "set", "clips", progress=False)
        built = open_records(tmp_path / "set")
        assert [type(s) for s in built[2].images] == [Video, bytes]
        assert built[2].image_names == found[2].image_names
        for ours, theirs in zip(
            data_of(found).batch_iterator(), data_of(built).batch_iterator(), strict=True
        ):
            for name, array in ours.arrays.items():
                np.testing.assert_array_equal(array, theirs.arrays[name])

    def test_a_set_holds_no_folders(self, files, tmp_path):
        found = records(files, video("v"))
        with pytest.raises(LlavaError, match="record 0 .*make one of the frames"):
            build_data_set(found.path, None, tmp_path / "set", "clips", progress=False)


def test_a_video_that_cannot_be_read_is_shown_as_it_is_measured(root):
    """One view of each of several pictures: a video next to a picture does not make it several."""
    Image.new("RGB", (50, 20)).save(root / "wide.png")
    fields = {"question": "<image> <video> What?", "image": "wide.png"}
    found = records(root, video(**fields), video(**fields) | {"video": "gone"})
    tiling = Tiling(((1, 1), (2, 1), (1, 2), (3, 1)), one_view=True)
    form = dataclasses.replace(
        FORMAT, image=dataclasses.replace(SPEC, mode="anyres", tiling=tiling)
    )
    shown = [show(found, number, form, byte_tokenizer()) for number in (0, 1)]
    tiles = [[slot["tiles"] for slot in one["image_slots"]] for one in shown]
    assert tiles == [[3, 5], [3, 1]]
