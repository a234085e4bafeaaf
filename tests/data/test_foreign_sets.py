"""TFDS data sets made by other programs, with features of their own."""

import io
import json

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from llava_jax.data.media import load_image
from llava_jax.data.records import checked_record, open_records
from llava_jax.data.video import Video
from llava_jax.errors import LlavaError, RecordError

Text, Sequence, Picture = tfds.features.Text, tfds.features.Sequence, tfds.features.Image
TALK = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "blue"}]
NESTED = {"from": Text(), "value": Text()}


def png(seed):
    """With a palette, which TFDS would decode as numbers of colours."""
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 30, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert("P").save(file, "PNG")
    return file.getvalue()


def make(folder, features, examples):
    class Foreign(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """A set."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                description="Of another program.",
                features=tfds.features.FeaturesDict(features),
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            yield from enumerate(examples)

    Foreign.name = "foreign"
    builder = Foreign(data_dir=folder, file_format="array_record")
    builder.download_and_prepare()
    return builder.data_dir


@pytest.mark.parametrize(
    "features, example, images, ignored",
    [
        ({"image": Picture(), "conversations": Sequence(NESTED)},
         {"image": png(1), "conversations": TALK}, [png(1)], []),
        ({"images": Sequence(Picture()), "conversations": Sequence(NESTED), "id": np.int64},
         {"images": [png(1)], "conversations": TALK, "id": 7}, [png(1)], []),
        ({"image": Picture(), "conversations": tfds.features.Dataset(NESTED)},
         {"image": png(1), "conversations": TALK}, [png(1)], []),
        ({"image": Text(), "conversations": Text(), "score": np.float32, "source": Text()},
         {"image": png(2), "conversations": json.dumps(TALK), "score": 1.0, "source": "web"},
         [png(2)], ["score"]),
        ({"images": Sequence(Text()), "conversations": Text(), "system": Text(), "id": Text()},
         {"images": [], "conversations": json.dumps([{**TALK[0], "value": "hi"}, TALK[1]]),
          "system": "Be brief.", "id": "7"}, [], []),
    ],
)  # fmt: skip
def test_features_that_are_understood(tmp_path, features, example, images, ignored):
    records = open_records(make(tmp_path, features, [example, example]))
    record = checked_record(records, 1)
    assert list(record.images) == images and len(record.image_names) == len(images)
    assert [turn.role for turn in record.turns] == ["human", "gpt"]
    assert record.id == str(example.get("id", 1))
    assert record.system == example.get("system")
    assert records.ignored_keys() == dict.fromkeys(ignored, 2)
    assert len(records.fingerprint()) == 64


def test_the_fingerprint_is_of_the_content(tmp_path):
    make_one = lambda name, text: open_records(
        make(tmp_path / name, {"conversations": Text()}, [{"conversations": text}])
    ).fingerprint()
    assert make_one("a", "[1]") == make_one("b", "[1]") != make_one("c", "[2]")


@pytest.mark.parametrize(
    "features, example, words",
    [
        ({"text": Text(), "label": np.int64}, {"text": "a", "label": 1},
         "features are .*text \\(Text\\).* none is 'conversations'"),
        ({"conversations": np.int64}, {"conversations": 1}, "the feature 'conversations'"),
        ({"conversations": Sequence(Text())}, {"conversations": ["a"]}, "feature 'conversations'"),
        ({"conversations": Text(), "image": np.int64}, {"conversations": "[]", "image": 1},
         "the feature 'image' .*expected: id"),
        ({"conversations": Text(), "audio": Text()}, {"conversations": "[]", "audio": "a"},
         "feature 'audio': only images"),
        ({"conversations": Text(), "video": np.int64}, {"conversations": "[]", "video": 1},
         "the feature 'video' .*expected: id"),
    ],
)  # fmt: skip
def test_features_that_are_not(tmp_path, features, example, words):
    with pytest.raises(LlavaError, match=words):
        open_records(make(tmp_path, features, [example]))


def test_a_path_in_place_of_an_image_is_named(tmp_path):
    example = {"image": b"cat.png", "conversations": json.dumps(TALK)}
    records = open_records(make(tmp_path, {"image": Text(), "conversations": Text()}, [example]))
    record = checked_record(records, 0)
    with pytest.raises(LlavaError, match="'cat.png'.* is not an image"):
        load_image(record.images[0], record.image_names[0])


@pytest.mark.parametrize(
    "example, words",
    [
        ({"image": png(1), "conversations": "not JSON"}, "record 0"),
        ({"image": png(1), "conversations": "{}"}, "must be a list of turns"),
    ],
)
def test_faulty_examples(tmp_path, example, words):
    records = open_records(make(tmp_path, {"image": Text(), "conversations": Text()}, [example]))
    with pytest.raises(RecordError, match=words):
        checked_record(records, 0)


def test_a_record_without_a_picture_or_video_has_no_bytes(tmp_path):
    features = {"image": Text(), "video": Text(), "conversations": Text()}
    talk = [{"from": "human", "value": "<image> What?"}, {"from": "gpt", "value": "x"}]
    examples = [
        {"image": png(1), "video": b"", "conversations": json.dumps(talk)},
        {"image": b"", "video": b"...", "conversations": json.dumps(talk)},
    ]
    picture, clip = (checked_record(open_records(make(tmp_path, features, examples)), i)
                     for i in range(2))  # fmt: skip
    assert picture.images == (png(1),) and clip.images == (Video(b"..."),)


def with_boxes(folder, text, answer="blue"):
    talk = [TALK[0], {"from": "gpt", "value": answer}]
    example = {"image": png(1), "conversations": json.dumps(talk), "boxes": text}
    return open_records(make(folder, dict.fromkeys(example, Text()), [example]))


@pytest.mark.parametrize("text", ["[[1, 2, 3, 4]]", "5", "none", b"\xff\x00", '{"cat": 1}', ""])
def test_boxes_of_another_program_are_ignored(tmp_path, text):
    record = checked_record(with_boxes(tmp_path, text), 0)
    assert record.boxes == () and record.ignored_keys == (("boxes",) if text else ())


def test_boxes_of_another_program_that_a_text_refers_to_are_refused(tmp_path):
    with pytest.raises(RecordError, match="box_format None: declare one of"):
        checked_record(with_boxes(tmp_path, "[[1, 2, 3, 4]]", answer="<box>"), 0)
