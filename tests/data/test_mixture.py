"""Mixtures of record files: what is drawn of each, and where a fault lies."""

import json
import pickle

import pytest
import yaml

from llava_jax.data import build
from llava_jax.data.pipeline import TrainingData
from llava_jax.data.records import about, checked_record, open_records
from llava_jax.data.show import as_text, show
from llava_jax.errors import LlavaError
from tests.data import same_records as same
from tests.data.conftest import record
from tests.data.test_tiles import FORMAT
from tests.tiny_model import byte_tokenizer, random_image

COUNT = 40


@pytest.fixture
def mix(tmp_path):
    """mix(entry, ...): a YAML file of these entries, each a strategy of a file of 40 records."""
    (tmp_path / "lists").mkdir()
    random_image(0).save(tmp_path / "lists/cat.png")

    def mix(*entries, **top):
        listed = []
        for number, entry in enumerate(entries):
            name = f"part{number}.json{'l' * (number % 2)}"
            items = [record(f"{number}-{i}", image="cat.png") for i in range(COUNT)]
            lines = "\n".join(map(json.dumps, items)) if number % 2 else json.dumps(items)
            (tmp_path / "lists" / name).write_text(lines)
            strategy = {"sampling_strategy": entry} if isinstance(entry, str) else entry
            listed.append({"json_path": name} | strategy)
        path = tmp_path / "lists/mix.yaml"
        path.write_text(yaml.safe_dump({"datasets": listed} | top))
        return path

    return mix


def ids(records) -> list[str]:
    return [records[i].id for i in range(len(records))]


def test_each_strategy_draws_what_it_says(mix):
    path = mix("all", "first:3", "end:5%", "random:10", "random: 7%", {}, "first:100")
    records = open_records(path)
    of = lambda number: [i.split("-")[1] for i in ids(records) if i.startswith(f"{number}-")]
    whole = [str(i) for i in range(COUNT)]
    assert of(0) == of(5) == of(6) == whole
    assert of(1) == whole[:3] and of(2) == whole[-2:]
    assert len(of(3)) == 10 and len(of(4)) == 3  # 2.8 rounded up
    assert of(3) != whole[:10] and len({*of(3)}) == 10
    assert len(records) == 138
    assert "part3.jsonl: 10 of 40 records (random:10), 7.2% of the mixture" in records.shares()


def test_any_data_set_may_be_part(mix, tmp_path):
    folder, shown = tmp_path / "lists", [{"role": "user", "content": "<image>\nWhat?"}]
    talk = [*shown, {"role": "assistant", "content": "A cat."}]
    rows = [{"id": f"p{i}", "image": "cat.png", "messages": talk} for i in range(6)]
    same.write_parquet(folder / "set/train-00000-of-00001.parquet", rows[:4])
    same.write_parquet(folder / "set/test-00000-of-00001.parquet", rows[4:])
    picture = (folder / "cat.png").read_bytes()
    same.write_tar(
        folder / "t-00.tar", [(f"t{i}", {"png": picture, "txt": b"x"}) for i in range(3)]
    )
    (folder / "qa.json").write_text('[{"q": "Who?", "a": "I", "id": "q0"}]')
    path = mix(
        "first:2",
        {"json_path": None, "path": "set", "split": "test"},
        {"json_path": None, "path": "t-{00..00}.tar", "sampling_strategy": "end:1"},
        {"json_path": None, "path": "qa.json", "columns": {"question": "q", "answer": "a"}},
    )
    records = pickle.loads(pickle.dumps(open_records(path, cache_dir=tmp_path / "cache")))
    assert ids(records) == ["0-0", "0-1", "p4", "p5", "t2", "q0"]
    assert checked_record(records, 2).turns[1].text == "A cat."
    assert records[4].origin == "number 2 of t-{00..00}.tar, t2 of t-00.tar"
    (said,) = [line for line in about(records) if line.startswith("read as")]
    assert "set: messages of role and content (2 records in 1 Parquet file)" in said
    assert "qa.json: question and answer (1 records)" in said
    data = TrainingData(records, byte_tokenizer(), FORMAT, batch_size=1, epochs=1, progress=False)
    assert data.records_used == 6 and len([*(tmp_path / "cache").iterdir()]) == 2


def test_records_are_repeated(mix):
    records = open_records(mix({"repeat": 2, "sampling_strategy": "first:2"}, "first:1"))
    assert ids(records) == ["0-0", "0-1", "0-0", "0-1", "1-0"]
    assert records.shares()[0].endswith("4 of 40 records (first:2, 2 times), 80.0% of the mixture")


def test_weights_are_shares_of_the_mixture(mix):
    path = mix({"weight": 3}, {"weight": 1, "sampling_strategy": "first:20"})
    records = open_records(path, seed=1)
    drawn = ids(records)
    first, second = ([i for i in drawn if i.startswith(f"{n}-")] for n in (0, 1))
    assert (len(first), len(second)) == (45, 15)
    assert len({*first}) == 40 and len({*second}) == 15  # five of the first come twice
    assert drawn == ids(open_records(path, seed=1)) != ids(open_records(path, seed=2))
    assert {*second} <= {f"1-{i}" for i in range(20)}


def test_draws_are_a_pure_function_of_the_seed(mix):
    path = mix("random:10", "random:10")
    draw = lambda seed: ids(open_records(path, seed=seed))
    assert draw(1) == draw(1) != draw(2)
    first = open_records(path, seed=1)
    assert ids(pickle.loads(pickle.dumps(first))) == draw(1)
    assert first.fingerprint() == open_records(path, seed=1).fingerprint()
    assert first.fingerprint() != open_records(path, seed=2).fingerprint()
    drawn = draw(1)
    assert [i[2:] for i in drawn[:10]] != [i[2:] for i in drawn[10:]]  # each file has its own


def test_pictures_start_from_the_folder_of_the_list(mix, tmp_path):
    path = mix("first:1")
    assert checked_record(open_records(path), 0).images == (str(tmp_path / "lists/cat.png"),)
    (tmp_path / "else").mkdir()
    random_image(0).save(tmp_path / "else/cat.png")
    assert (
        checked_record(open_records(path, tmp_path / "else"), 0)
        .images[0]
        .startswith(str(tmp_path / "else"))
    )


def test_a_mixture_is_trained_on_in_an_order_of_seed_and_step(mix):
    path = mix("random:10", "first:5")

    def order(seed):
        records = open_records(path, seed=seed)
        options = {"batch_size": 1, "epochs": 1, "seed": seed, "progress": False}
        data = TrainingData(records, byte_tokenizer(), FORMAT, **options)
        return [i for batch in data.batch_iterator() for i in batch.record_ids], data

    first, data = order(3)
    assert first == order(3)[0] != sorted(first) and sorted(first) == sorted(ids(data.records))
    assert first != order(4)[0]
    assert [i for batch in data.batch_iterator(start_step=4) for i in batch.record_ids] == first[4:]


def test_a_fault_is_named_by_its_file(mix, tmp_path):
    path = mix("end:2", "end:2")
    part = tmp_path / "lists/part1.jsonl"
    lines = part.read_text().splitlines()
    items = [json.loads(line) for line in lines]
    items[-1]["image"] = "gone.png"
    items[-2]["conversations"][0]["from"] = "robot"
    part.write_text("\n".join(map(json.dumps, items)))
    records = open_records(path)
    with pytest.raises(LlavaError, match=r"mix.yaml: record 2, of part1.jsonl: record 38 \(id"):
        checked_record(records, 2)
    with pytest.raises(LlavaError, match=r"record 3 \(id '1-39', number 39 of part1.jsonl\): no "):
        checked_record(records, 3)


WRONG = {
    "json_path missing": ([{"json_path": None}], {}, "entry 0 has no json_path"),
    "no such file": (
        [{"json_path": "gone.json"}],
        {},
        "entry 0: no data file or data set at .*gone.json",
    ),
    "a folder": ([{"json_path": "set"}], {}, "entry 0: no data file or data set at .*set"),
    "strategy": (["all", "some:3"], {}, "entry 1: sampling_strategy is 'some:3': give all, first"),
    "fraction": (["random:2.5%"], {}, "sampling_strategy is 'random:2.5%'"),
    "nothing": (["first:0"], {}, "entry 0: first:0 of part0.json with 40 records is nothing"),
    "a slip": ([{"sampling_stategy": "all"}], {}, "entry 0: unknown key 'sampling_stategy', did"),
    "two paths": ([{"path": "a.json"}], {}, "entry 0 has a path too many"),
    "a list": ([{"json_path": "mix.yaml"}], {}, "mix.yaml is a list itself"),
    "weights": ([{"weight": 1}, "all"], {}, "give every entry a weight, or none"),
    "no weight": ([{"weight": 0}], {}, "entry 0: weight is 0: it must be above 0"),
    "weight of text": ([{"weight": "1"}], {}, "entry 0: weight cannot be '1'"),
    "repeat": ([{"repeat": 0}], {}, "entry 0: repeat is 0: give a number of times from 1"),
    "times": ([{"repeat": 10**14}], {}, "entry 0: 40 records 100,000,000,000,000 times are 4,000"),
    "both": ([{"repeat": 2, "weight": 1}], {}, "entry 0: repeat is 2: .* no weight with it"),
    "columns": ([{"columns": {"q": "a"}}], {}, "entry 0: config.data.columns names 'q'"),
    "split": ([{"split": "test"}], {}, "entry 0: .*names files and has no splits"),
    "no list": ([], {}, "must hold a list 'datasets'"),
    "another list": ([], {"dataset": []}, "must hold a list 'datasets'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_list_is_refused(mix, name):
    entries, top, message = WRONG[name]
    with pytest.raises(LlavaError, match=message):
        open_records(mix(*entries, **top))


def test_text_that_is_no_list_is_refused(tmp_path):
    (tmp_path / "mix.yml").write_text("datasets: [\n  {json_path: a.json\n")
    with pytest.raises(LlavaError, match="mix.yml is not valid YAML at line 3"):
        open_records(tmp_path / "mix.yml")


def test_show_says_where_a_record_is_from(mix):
    shown = show(open_records(mix("first:1", "end:1")), 1, FORMAT, byte_tokenizer())
    assert "record 1 (id '1-39'), number 39 of part1.jsonl, template chatml" in as_text(
        shown, False
    )


def test_keys_that_nothing_reads_are_reported(mix):
    records = open_records(mix({"comment": "ours"}, version=2))
    assert records.shares()[-1] == "ignored keys of the list: comment, version"


def test_a_mixture_can_be_built(mix, tmp_path):
    path = mix("first:3", "end:2")
    built = build.build_data_set(path, None, tmp_path / "sets", "mix", progress=False)
    assert ids(open_records(built)) == ["0-0", "0-1", "0-2", "1-38", "1-39"]
