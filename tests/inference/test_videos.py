"""Videos as prompts show them: their tokens, words and times, and what is refused."""

import dataclasses
import shutil

import numpy as np
import pytest

import llava_jax
from llava_jax.data import video
from llava_jax.errors import LlavaError
from llava_jax.inference.model import Llava
from llava_jax.inference.sampling import SamplingParams
from llava_jax.models.images import ImageSpec
from llava_jax.models.video import VideoSpec
from tests.tiny_model import CONFIG, byte_tokenizer, random_image, random_params
from tests.videos import frame, write_video

Video = llava_jax.Video
PARAMS = SamplingParams(4)
# Tiles of 16 pixels with 16 features, of which a frame keeps 4; 3 frames and a newline.
SPEC = ImageSpec(16, "resize", video=VideoSpec(frames=3))
MOVING = [frame(number) for number in (0, 20, 35)]


def model_with(spec: ImageSpec, **options) -> Llava:
    config = dataclasses.replace(CONFIG, image=spec)
    decoder = dataclasses.replace(config.decoder, max_position_embeddings=1024)
    config = dataclasses.replace(config, decoder=decoder)
    return Llava(config, random_params(config), byte_tokenizer(), "chatml", **options)


@pytest.fixture(scope="module")
def model() -> Llava:
    return model_with(SPEC)


def text_of(model: Llava, request) -> str:
    """The prompt as text, `#` for each token of a picture or video."""
    ids = [35 if i == model.config.image_token_id else i for i in request.input_ids.tolist()]
    alphabet = model.tokenizer.convert_tokens_to_ids("#")
    return model.tokenizer.decode([alphabet if i == 35 else i for i in ids])


@pytest.mark.parametrize("question", ["What?", "<image>\nWhat?", "<video>\nWhat?"])
def test_a_video_stands_where_it_is_written(model, question):
    request = model.request(question, Video(MOVING), PARAMS)
    (ids,) = np.nonzero(request.input_ids == model.config.image_token_id)
    assert len(ids) == 3 * 4 + 1 and (np.diff(ids) == 1).all()
    other = model.request("<image>\nWhat?", Video(MOVING), PARAMS)
    np.testing.assert_array_equal(request.input_ids, other.input_ids)


def test_pictures_and_videos_stand_side_by_side(model):
    given = [random_image(0), Video(MOVING), random_image(1)]
    mixed = model.request("<image> <video> <image>?", given, PARAMS)
    assert [len(picture.layout) for picture in mixed.pictures] == [16, 13, 16]
    plain = model.request("<image> <image> <image>?", given, PARAMS)
    np.testing.assert_array_equal(mixed.input_ids, plain.input_ids)
    with pytest.raises(LlavaError, match="mark 0 of the text is <video>, but it is a picture"):
        model.request("<video> <image> <image>?", given, PARAMS)
    with pytest.raises(LlavaError, match="has 1 <image> but 3 image"):
        model.request("<video>?", given, PARAMS)


def test_without_a_video_its_mark_is_text(model):
    request = model.request("<video>", None, PARAMS)
    assert "<video>" in model.tokenizer.decode(request.input_ids)


def test_answers_depend_on_every_frame(model):
    answers = {
        model.chat("What?", Video([MOVING[i] for i in order]), max_tokens=8)
        for order in [(0, 1, 2), (2, 1, 0), (0, 1, 1), (1, 1, 2)]
    }
    assert len(answers) > 1
    again = model.generate(["What?"] * 2, [Video(MOVING), Video(MOVING)], max_tokens=8)
    assert again == [model.chat("What?", Video(MOVING), max_tokens=8)] * 2


def test_a_video_is_asked_about_again_in_a_conversation(model):
    history = [("<video>\nWhat?", "a")]
    answer = model.chat("And now?", Video(MOVING), history, max_tokens=6)
    spelled = model.chat("And now?", Video(MOVING), [("<image>\nWhat?", "a")], max_tokens=6)
    assert answer == spelled


def test_more_frames_than_the_model_is_used_to(model):
    request = model.request("What?", Video([frame(i) for i in range(9)], frames=5), PARAMS)
    assert len(request.pictures[0].layout) == 5 * 4 + 1
    assert request.pictures[0].load().shape == (5, 16, 16, 3)


def test_folders_and_files_are_read_by_path(model, tmp_path):
    for number, picture in enumerate(MOVING):
        picture.save(tmp_path / f"{number}.png")
    by_folder = model.chat("What?", Video(tmp_path), max_tokens=8)
    assert by_folder == model.chat("What?", Video(MOVING), max_tokens=8)
    with pytest.raises(LlavaError, match="no video file '.*none.mp4'"):
        model.chat("What?", str(tmp_path / "none.mp4"))
    (tmp_path / "3.png").write_bytes((tmp_path / "0.png").read_bytes()[:60])
    with pytest.raises(LlavaError, match="frame 3' is broken or truncated"):
        model.chat("What?", Video(tmp_path, frames=4))


def test_a_file_is_known_by_its_ending(model, tmp_path):
    pytest.importorskip("av", reason="PyAV (llava_jax[video]) is not installed")
    path = write_video(tmp_path / "a.mp4", 30)
    whole = model.chat("What?", path, max_tokens=8)
    assert whole == model.chat("What?", Video(str(path)), max_tokens=8)
    assert whole == model.chat("What?", Video(path.read_bytes()), max_tokens=8)


def test_the_times_of_the_frames_stand_before_the_question():
    spec = dataclasses.replace(SPEC, video=VideoSpec(frames=2, time_instruction=True))
    model = model_with(spec)
    times = (
        "The video lasts for 1.50 seconds, and 2 frames are uniformly sampled from it. These "
        "frames are located at 0.00s,1.00s.Please answer the following questions related to this "
        "video."
    )
    for question in ("What?", "<video>\nWhat?", "<image>What?"):
        request = model.request(question, Video(MOVING), PARAMS)
        assert f"{'#' * 9}\n{times}\nWhat?<|im_end|>" in text_of(model, request)
    request = model.request("What?", random_image(0), PARAMS)
    assert f"{'#' * 16}\nWhat?" in text_of(model, request)


def test_a_model_without_videos_refuses_them(tmp_path):
    model = model_with(ImageSpec(16, "resize"))
    with pytest.raises(LlavaError, match="the model takes pictures, not videos"):
        model.chat("What?", Video(MOVING))


CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}<image>\n{% endfor %}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'video') %}<video>\n{% endfor %}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}{{ c['text'] }}"
    "{% endfor %}<|im_end|>\n{% endfor %}<|im_start|>assistant"
)


def test_a_processors_words_for_videos():
    model = model_with(SPEC, chat_template=CHAT_TEMPLATE)
    request = model.request("<video>\nWhat?", Video(MOVING), PARAMS)
    expected = f"<|im_start|>user\n{'#' * 13}\nWhat?<|im_end|>\n<|im_start|>assistant"
    assert text_of(model, request) == expected
    both = [random_image(0), Video(MOVING)]
    request = model.request("<image><video>What?", both, PARAMS)
    assert f"user\n{'#' * 16}\n{'#' * 13}\nWhat?" in text_of(model, request)
    with pytest.raises(LlavaError, match="give its pictures first, then its videos"):
        model.request("<video><image>What?", both[::-1], PARAMS)


def test_what_is_no_image_or_video(model):
    with pytest.raises(LlavaError, match="a Pillow image or a Video, not int"):
        model.chat("What?", [3])
    with pytest.raises(LlavaError, match="images must be a list, not Video"):
        model.generate(["a", "b"], Video(MOVING))


def test_a_video_that_goes_away_is_a_fault_of_its_answer_alone(model, tmp_path):
    pytest.importorskip("av", reason="PyAV (llava_jax[video]) is not installed")
    gone, folder = write_video(tmp_path / "gone.mp4", 30), tmp_path / "frames"
    folder.mkdir()
    for number, picture in enumerate(MOVING):
        picture.save(folder / f"{number}.png")
    sources = [Video(gone), Video(folder), Video(MOVING)]
    requests = [model.request("What?", source, PARAMS) for source in sources]
    gone.unlink()
    shutil.rmtree(folder)
    jobs = [model.jobs(request)[0] for request in requests]
    assert sum(answer.done for answer in model.engine.run(jobs, 4)) == 3
    first, second, third = (job.answer for job in jobs)
    assert f"no video file '{gone}': No such file" in str(first.error)
    assert f"no video file '{folder}': No such file" in str(second.error)
    assert third.error is None and third.tokens
    with pytest.raises(LlavaError, match="no video file"):
        model.request("What?", Video("a\0.mp4"), PARAMS)


def test_a_video_that_changes_between_request_and_answer_is_an_error(model, tmp_path):
    for number, picture in enumerate(MOVING):
        picture.save(tmp_path / f"{number}.png")
    request = model.request("What?", Video(tmp_path), PARAMS)
    (tmp_path / "2.png").unlink()
    words = "changed while it was asked about: it had 64x48 pixels and 3 frames and has .* 2 frames"
    with pytest.raises(LlavaError, match=words):
        model.answer([request], 4)


def test_the_head_of_a_video_is_read_once_for_many_questions(model, tmp_path, monkeypatch):
    for number, picture in enumerate(MOVING):
        picture.save(tmp_path / f"{number}.png")
    read, inspect = [], video.inspect_video
    monkeypatch.setattr(video, "inspect_video", lambda *args: read.append(1) or inspect(*args))
    lengths = lambda: [
        len(p.layout) for p in model.request("What?", Video(tmp_path), PARAMS).pictures
    ]
    assert lengths() == lengths() == [13] and len(read) == 1
    model.request("What?", Video(tmp_path, frames=2), PARAMS)
    assert len(read) == 2
    (tmp_path / "2.png").unlink()
    assert lengths() == [9] and len(read) == 3
