"""CHAIR: objects found in a text, and descriptions compared with what is in the picture."""

import pytest

from llava_jax.errors import LlavaError
from llava_jax.evaluation import load_benchmark
from llava_jax.evaluation.chair import Objects
from tests.evaluation.published import prompts, write

SYNONYMS = """person, man, woman, child, baby
bird, duck, goose
dog, puppy, pup
train, locomotive
knife, pocketknife
chair, seat, stool
toilet, commode
tie, bow tie
hot dog
wine glass
fire hydrant, hydrant
"""


@pytest.mark.parametrize(
    "text, names",
    [
        ("Two puppies beside a fire hydrant.", ["dog", "fire hydrant"]),
        ("Women, men and children", ["person", "person", "person"]),
        ("a baby bird and a baby", ["bird", "person"]),
        ("a dog eats two hot dogs", ["dog", "hot dog"]),
        ("wine glasses, knives and geese", ["wine glass", "knife", "bird"]),
        ("the seat of the toilet", ["toilet"]),
        ("a toilet seat", ["toilet"]),
        ("a seat", ["chair"]),
        ("the train tracks, a passenger train", ["train"]),
        ("a man in a bow tie", ["person", "tie"]),
        ("a glass of wine, a manhole, dogmatic", []),
        ("", []),
    ],
)
def test_objects_are_found_in_a_text(text, names):
    assert Objects(SYNONYMS.splitlines()).find(text) == names


def chair(root, categories=("person", "dog", "chair"), count=2, seed=0):
    instances = {
        "images": [{"id": i, "file_name": f"COCO_val2014_{i:012d}.jpg"} for i in (1, 2, 3)],
        "categories": [{"id": i, "name": name} for i, name in enumerate(categories)],
        "annotations": [{"image_id": 1, "category_id": 0}, {"image_id": 2, "category_id": 1},
                        {"image_id": 2, "category_id": 1}],
    }  # fmt: skip
    captions = {"annotations": [{"image_id": 1, "caption": "A woman on a stool."}]}
    write(root, "synonyms.txt", SYNONYMS)
    write(root, "annotations/instances_val2014.json", instances)
    write(root, "annotations/captions_val2014.json", captions)
    return load_benchmark("chair", root, {"count": count, "seed": seed})


def test_chair_counts_mentions_descriptions_and_recall(tmp_path):
    benchmark = chair(tmp_path)
    assert prompts(benchmark) == ["<image>\nPlease describe this image in detail."] * 2
    by_id = {question.id: question for question in benchmark.questions}
    assert set(by_id) == {"1", "2"}  # picture 3 has no annotated object
    assert by_id["1"].reference == "chair, person"
    assert by_id["2"].images == (str(tmp_path / "val2014/COCO_val2014_000000000002.jpg"),)
    texts = {"1": "A man sits. The man has a dog.", "2": "A puppy."}
    answers = [texts[question.id] for question in benchmark.questions]
    (line,) = benchmark.score(benchmark.questions, answers)
    # Four mentions, the dog of picture 1 wrong; of the three true objects person and dog found.
    assert line.values == pytest.approx(
        {"CHAIR_i": 25.0, "CHAIR_s": 50.0, "recall": 200 / 3, "words": 5.0}
    )
    assert line.errors["CHAIR_s"] == pytest.approx(50 / 2**0.5, rel=0.1)
    assert [benchmark.grade(by_id[i], texts[i]) for i in ("1", "2")] == [0, 1]


def test_chair_draws_pictures_by_seed_and_needs_the_published_list(tmp_path):
    first = [chair(tmp_path, count=1, seed=seed).questions[0].id for seed in range(8)]
    assert set(first) == {"1", "2"}
    assert first == [chair(tmp_path, count=1, seed=seed).questions[0].id for seed in range(8)]
    with pytest.raises(LlavaError, match="count must be from 1 to 2, not 3"):
        chair(tmp_path, count=3)
    with pytest.raises(LlavaError, match="synonyms.txt lacks COCO's 'zebra'"):
        chair(tmp_path, categories=("person", "dog", "zebra"))
    (tmp_path / "synonyms.txt").unlink()
    with pytest.raises(LlavaError, match="synonyms.txt is missing: .*LisaAnne/Hallucination"):
        load_benchmark("chair", tmp_path, {"count": 1, "seed": 0})
