"""Frames of videos: which are shown, that they are those of the file, and broken files."""

import pathlib
import shutil

import numpy as np
import pytest
from PIL import Image

from llava_jax.data import video as module
from llava_jax.data.media import ImageError, preprocess
from llava_jax.data.video import (
    Footage,
    Video,
    frames,
    inspect_video,
    is_video_path,
    sampled,
    time_instruction,
    video_tiles,
)
from llava_jax.errors import LlavaError
from llava_jax.models.images import ImageSpec
from llava_jax.models.video import VideoSpec
from tests.videos import frame, number_of, write_video

SPEC = ImageSpec(8, "resize", video=VideoSpec("resize", frames=5))
FORMATS = {
    "mp4": dict(codec="libx264", bf="2"),
    "mov": dict(codec="mpeg4"),
    "mkv": dict(codec="libx264", bf="3"),
    "webm": dict(codec="libvpx-vp9"),
    "avi": dict(codec="mpeg4", bf="2"),
    "ts": dict(codec="libx264", bf="2"),
    "open.mp4": {"codec": "libx264", "x264-params": "open-gop=1:bframes=3:b-adapt=0:keyint=6"},
}


@pytest.fixture(scope="module")
def av():
    return pytest.importorskip("av", reason="PyAV (llava_jax[video]) is not installed")


def original(frames, rate, fps, upbound, force):
    """The frames that process_video_with_decord of LLaVA-NeXT takes."""
    numbers = list(range(0, frames, round(rate / fps)))
    if upbound > 0 and (len(numbers) > upbound or force):
        numbers = np.linspace(0, frames - 1, upbound, dtype=int).tolist()
    return numbers


@pytest.mark.parametrize("frames, rate", [(1, 30), (7, 25), (100, 29.97), (3001, 23.976)])
@pytest.mark.parametrize("upbound", [1, 8, 64])
def test_frames_are_those_of_the_original(frames, rate, upbound):
    footage = Footage((4, 4), frames, rate, still=False)
    forced = sampled(footage, upbound, 0, "")
    assert forced.tolist() == original(frames, rate, 1, upbound, True)
    for fps in (1, 2):
        assert sampled(footage, upbound, fps, "").tolist() == original(
            frames, rate, fps, upbound, False
        )
        assert sampled(footage, 0, fps, "").tolist() == original(frames, rate, fps, 0, False)


def test_more_frames_a_second_than_there_are_is_every_frame():
    assert sampled(Footage((4, 4), 3, 10, False), 0, 1000, "").tolist() == [0, 1, 2]


def test_pictures_are_shown_once_where_they_fit():
    still = lambda frames: Footage((4, 4), frames, 2.0, still=True)
    assert sampled(still(3), 5, 0, "").tolist() == [0, 1, 2]
    assert sampled(still(9), 5, 0, "").tolist() == [0, 2, 4, 6, 8]


def test_a_rate_that_is_not_known_is_an_error_where_it_is_needed():
    footage = Footage((4, 4), 9, None, still=False)
    assert len(sampled(footage, 4, 0, "x.ts")) == 4
    with pytest.raises(ImageError, match="'x.ts' does not say how many frames a second"):
        sampled(footage, 4, 1, "x.ts")


def test_time_instruction():
    footage = Footage((4, 4), 100, 30.0, still=False)
    assert time_instruction(footage, np.array([0, 49, 99]), "x") == (
        "The video lasts for 3.33 seconds, and 3 frames are uniformly sampled from it. These "
        "frames are located at 0.00s,1.63s,3.30s.Please answer the following questions related to "
        "this video."
    )


@pytest.mark.parametrize("ending", FORMATS)
def test_every_frame_of_every_format_is_found(av, tmp_path, ending):
    path = write_video(tmp_path / f"a.{ending}", 40, **FORMATS[ending])
    assert inspect_video(Video(path), "a")[:3] == ((64, 48), 40, 10.0)
    for video in (Video(path, frames=40), Video(path, frames=7), Video(path.read_bytes(), 3)):
        footage, numbers, tiles = video_tiles(video, SPEC, "a")
        assert footage.frames == 40 and tiles.shape == (len(numbers), 8, 8, 3)
        assert [number_of(tile) for tile in tiles] == numbers.tolist()


@pytest.mark.parametrize("ending", ["mp4", "mkv"])
def test_frames_at_irregular_times_are_counted_not_timed(av, tmp_path, ending):
    times = [0, 1, 2, 10, 11, 30, 31, 32, 33, 60, 61, 62, 63, 64, 90, 200]
    path = write_video(tmp_path / f"a.{ending}", 16, times=times, codec="libx264", bf="2")
    for count in (16, 5):
        _, numbers, tiles = video_tiles(Video(path, frames=count), SPEC, "a")
        assert [number_of(tile) for tile in tiles] == numbers.tolist()


def test_a_short_video_shows_frames_twice(av, tmp_path):
    path = write_video(tmp_path / "a.mp4", 2)
    _, numbers, tiles = video_tiles(Video(path), SPEC, "a")
    assert numbers.tolist() == [0, 0, 0, 0, 1] == [number_of(tile) for tile in tiles]


def test_only_the_last_group_is_decoded_for_the_last_frame(av, tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", 39, key_every=10)
    decoded = []
    picture = av.container.InputContainer.decode
    spy = lambda self, stream: (decoded.append(f) or f for f in picture(self, stream))
    monkeypatch.setattr("llava_jax.data.video._frames", spy)
    video_tiles(Video(path, frames=1, fps=0), SPEC, "a")
    assert len(decoded) <= 2
    decoded.clear()
    assert number_of(video_tiles(Video(path, frames=2), SPEC, "a")[2][1]) == 38
    assert len(decoded) < 20


def test_tiles_are_those_of_pillow(av, tmp_path):
    path = write_video(tmp_path / "a.mkv", 3, codec="ffv1", size=(50, 30))
    for mode in ("resize", "square", "pad"):
        spec = ImageSpec(16, "resize", video=VideoSpec(mode, frames=3))
        _, _, tiles = video_tiles(Video(path), spec, "a")
        with av.open(str(path)) as file:
            images = [frame.to_image() for frame in file.decode(video=0)]
        expected = [preprocess(image, ImageSpec(16, mode)) for image in images]
        np.testing.assert_array_equal(tiles, np.concatenate(expected))


@pytest.mark.parametrize("rotation, white", [(90, np.s_[-3:]), (-90, np.s_[:3]), (0, np.s_[:, :3])])
def test_a_turned_video_is_upright(av, tmp_path, monkeypatch, rotation, white):
    """White on the left is below after a quarter turn against the clock."""
    left = Image.new("RGB", (64, 32))
    left.paste("white", (0, 0, 32, 32))
    monkeypatch.setattr("tests.videos.frame", lambda *_: left)
    path = write_video(tmp_path / "a.mp4", 1, size=(64, 32), rotation=rotation)
    (shown,) = frames(Video(path), "a", 1)
    assert shown.size == ((32, 64) if rotation else (64, 32))
    assert np.asarray(shown)[white].mean() > 240 > 150 > np.asarray(shown).mean()


@pytest.mark.parametrize("given", ["folder", "paths", "pictures"])
def test_pictures_as_a_video(tmp_path, given):
    names = [f"frame {number}.png" for number in range(12)]
    for number, name in enumerate(names):
        frame(number).save(tmp_path / name)
    (tmp_path / "notes.txt").touch()
    sources = {
        "folder": tmp_path,
        "paths": [str(tmp_path / name) for name in names],
        "pictures": [frame(number) for number in range(12)],
    }
    video = Video(sources[given], frames=12)
    assert inspect_video(video, "a") == ((64, 48), 12, 2.0, True)
    assert [number_of(tile) for tile in video_tiles(video, SPEC, "a")[2]] == list(range(12))
    five = video_tiles(Video(sources[given]), SPEC, "a")[2]
    assert [number_of(tile) for tile in five] == [0, 2, 5, 8, 11]


def _cut(path, share):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


FAULTS = {
    "empty file": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("no video at all, only words, words, words"),
    "cut at the end": lambda path: _cut(path, 0.9),
    "cut early": lambda path: _cut(path, 0.1),
    "missing": lambda path: path.unlink(),
    "playlist": lambda path: path.write_text("#EXTM3U\n#EXTINF:1,\n/etc/passwd\n"),
    "noise in the middle": lambda path: path.write_bytes(
        path.read_bytes()[:600] + bytes(range(256)) * 8 + path.read_bytes()[2648:]
    ),
    "empty folder": lambda path: (path.unlink(), path.mkdir()),
    "sound alone": lambda path: _write_sound(path),
}


def _write_sound(path):
    import av

    with av.open(str(path), "w") as file:
        stream = file.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        sound.sample_rate = 8000
        file.mux(stream.encode(sound))
        file.mux(stream.encode())


@pytest.mark.parametrize("fast_start", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_video_is_one_error_with_its_name(av, tmp_path, fault, fast_start):
    options = {"movflags": "faststart"} if fast_start else {}
    path = write_video(tmp_path / "a.mp4", 39, codec="libx264", container=options)
    FAULTS[fault](path)
    with pytest.raises(ImageError, match="'cats/a.mp4'"):
        video_tiles(Video(path, frames=39), SPEC, "cats/a.mp4")


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_a_cut_file_without_an_index_is_an_error_or_shorter(av, tmp_path, share):
    path = write_video(tmp_path / "a.mkv", 39, codec="libx264")
    _cut(path, share)
    try:
        frames = inspect_video(Video(path), "a").frames
    except ImageError as error:
        assert "broken or cut off" in str(error)
        return
    assert frames < 39
    _, numbers, tiles = video_tiles(Video(path, frames=frames), SPEC, "a")
    assert [number_of(tile) for tile in tiles] == numbers.tolist()


def test_inspecting_decodes_nothing_and_reads_no_more_than_the_index(av, tmp_path, monkeypatch):
    monkeypatch.setattr("llava_jax.data.video._frames", None)
    monkeypatch.setattr("llava_jax.data.video._packets", None)
    assert inspect_video(Video(write_video(tmp_path / "a.mp4", 9)), "a").frames == 9


@pytest.mark.parametrize("ending", ["mp4", "webm"])
def test_the_packets_of_a_file_are_read_once(av, tmp_path, monkeypatch, ending):
    path = write_video(tmp_path / f"a.{ending}", 9, **FORMATS[ending])
    read, passes = module._packets, []
    monkeypatch.setattr(module, "_packets", lambda *given: passes.append(given) or read(*given))
    assert video_tiles(Video(path), SPEC, "a")[0].frames == 9 and len(passes) == 1


def test_a_folder_is_listed_once_and_only_its_pictures_are_looked_at(tmp_path, monkeypatch):
    frame(3).save(tmp_path / "1.png")
    (tmp_path / "2.jpg").mkdir()
    (tmp_path / "notes.txt").touch()
    looked, is_file = [], pathlib.Path.is_file
    spy = lambda path, **options: looked.append(path.name) or is_file(path, **options)
    monkeypatch.setattr(pathlib.Path, "is_file", spy)
    assert video_tiles(Video(tmp_path), SPEC, "a")[0].frames == 1
    assert sorted(looked) == ["1.png", "2.jpg"]


def test_a_frame_of_too_many_pixels(av, tmp_path):
    path = write_video(tmp_path / "a.mp4", 2)
    with pytest.raises(ImageError, match="64x48 = 3,072 pixels, over the limit of 3,000"):
        video_tiles(Video(path), SPEC, "a", max_pixels=3000)
    with pytest.raises(ImageError, match="over the limit"):
        inspect_video(Video([Image.new("RGB", (64, 48))]), "a", max_pixels=3000)


def test_without_pyav_the_remedy_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.mp4").write_bytes(b"?")
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(LlavaError, match=r"pip install 'llava_jax\[video\]'"):
        inspect_video(Video(tmp_path / "a.mp4"), "a")


def test_what_is_no_video_or_no_sampling():
    for wrong in (3, None, {"a": 1}):
        with pytest.raises(LlavaError, match="a video is a path"):
            Video(wrong)
    with pytest.raises(LlavaError, match="fps of a video is -1"):
        Video("a.mp4", fps=-1)
    with pytest.raises(LlavaError, match="frames and fps are both 0"):
        video_tiles(Video([frame(0)], frames=0), SPEC, "a")
    with pytest.raises(LlavaError, match="0 frames and 0.0 frames a second"):
        VideoSpec(frames=0)
    with pytest.raises(ImageError, match="empty list"):
        inspect_video(Video([]), "a")


def test_video_paths_are_known_by_their_ending(tmp_path):
    assert is_video_path("a/B.MP4") and is_video_path(tmp_path / "a.webm")
    assert not is_video_path("a.gif") and not is_video_path(b"a.mp4") and not is_video_path(None)


def test_frames_next_to_other_files(av, tmp_path):
    """A folder whose name ends like a file is a folder."""
    folder = tmp_path / "a.mp4"
    folder.mkdir()
    frame(3).save(folder / "1.png")
    shutil.copy(folder / "1.png", folder / "2.jpeg")
    assert inspect_video(Video(folder), "a").frames == 2
