"""The command `llava-jax validate` without and with a recipe."""

import json
import re

import pytest

from llava_jax import cli
from llava_jax.data.fingerprints import Collector
from llava_jax.errors import LlavaError
from llava_jax.training import validate_data
from tests import tiny_run
from tests.data.conftest import record
from tests.data.test_duplicates import photo


def test_a_sound_set(data_set, command, capsys):
    assert command(validate_data, data_set[0], "--image_root", data_set[1]) == 0
    out = capsys.readouterr().out
    assert "24 records, 24 image files" in out and "no faults" in out


def test_pictures_are_compared_only_where_that_is_asked_for(
    data_set, command, capsys, tmp_path, monkeypatch
):
    added, add = [], Collector.add
    monkeypatch.setattr(Collector, "add", lambda *args: added.append(args) or add(*args))
    arguments = validate_data, data_set[0], "--image_root", data_set[1]
    assert command(*arguments) == 0
    assert not added and " pictures, " not in capsys.readouterr().out
    assert command(*arguments, "--report", tmp_path / "r.html") == 0
    assert len(added) == 24 and "24 pictures, 24 different" in capsys.readouterr().out


def test_columns_are_named_on_the_command_line(tmp_path, command, capsys):
    (tmp_path / "d.json").write_text('[{"query": "What?", "label": "A cat."}]')
    named = "--columns", "question=query", "answer=label"
    assert command(validate_data, tmp_path / "d.json", *named) == 0
    assert "read as question and answer (1 records)" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command(validate_data, tmp_path / "d.json", "--columns", "query")
    assert "'query' is not NAME=KEY" in capsys.readouterr().err


@pytest.fixture
def faulty_set(data_set):
    path, root = data_set
    items = json.loads(path.read_text())
    for index in (1, 2, 3, 5):
        items[index]["conversations"][0]["from"] = "robot"
    items[4]["conversations"] = []
    items[6]["image"] = "../6.png"
    items[7]["conversations"][0]["value"] += "<image>"
    (root / "a/9.png").unlink()
    (root / "a/10.png").write_bytes((root / "a/10.png").read_bytes()[:-50])
    (root / "a/11.png").write_text("<html>")
    items[12]["id"] = items[13]["id"] = "r14"
    items[17]["conversations"][0]["value"] += " <|im_end|>"
    items[18]["conversations"][0]["value"] += " why" * 100
    items[19]["conversations"][1]["value"] += " so" * 100
    path.write_text(json.dumps(items))
    return data_set


def test_every_fault_is_counted_and_named(faulty_set, tokenizer_folder, command, capsys):
    arguments = (faulty_set[0], "--image_root", faulty_set[1])
    more = ("--tokenizer", tokenizer_folder, "--template", "chatml", "--max_length", 120)
    assert command(validate_data, *arguments, *more, "--image_tokens", 4) == 1
    captured = capsys.readouterr()
    out = captured.out
    expected = {
        "unknown role": (4, "record 1 (id 'r1'), turn 0"),
        "no conversations": (1, "record 4"),
        "image outside the root": (1, "'../6.png'"),
        "<image> count": (1, "record 7 (id 'r7') has 2 <image>"),
        "missing image": (1, "record 9 (id 'r9')"),
        "unreadable image": (1, "record 10 (id 'r10'): image 'a/10.png' is broken or truncated"),
        "not an image": (1, "record 11 (id 'r11'): 'a/11.png' is not an image"),
        "repeated id": (2, "records 12 and 13 have the same id 'r14'"),
        "special token in the text": (1, "record 17 (id 'r17'), turn 0: '<|im_end|>'"),
        "left out when training: no supervised token is left at max_length=120": (1, "record 18"),
        "cut when training at max_length=120": (1, "record 19"),
    }
    for kind, (count, culprit) in expected.items():
        assert f"{count:>10}  {kind}\n" in out and culprit in out, kind
    assert "faults: 10" in out and "notes: 5" in out
    assert "… and 1 more" in out  # only three of the four unknown roles are printed
    assert "tokens a record: min" in out and ">120" in out and "█" in out
    assert "measuring" in captured.err


def test_max_pixels(data_set, command, capsys):
    assert (
        command(validate_data, data_set[0], "--image_root", data_set[1], "--max_pixels", 900) == 1
    )
    assert "image too large" in capsys.readouterr().out


@pytest.fixture
def recipe_file(world, tmp_path):
    """recipe_file(**changes by dotted key): a config file of a stage 1 in ChatML."""

    def write(changes=None):
        held_out = str(world / "data/held_out.json")
        changes = {"model.template": "chatml", "data.validation": held_out, **(changes or {})}
        values = tiny_run.align(world, tmp_path / "run", {"data.max_length": 320, **changes})
        path = tmp_path / "recipe.py"
        path.write_text(
            "from tests import tiny_run\n\n\n"
            f"def get_config():\n    return tiny_run.recipe({{}}, {values!r})\n"
        )
        return path

    return write


def test_a_recipe_says_everything(recipe_file, world, capsys):
    assert cli.main(["validate", "--config", str(recipe_file())]) == 0
    out = capsys.readouterr().out
    for name, count in (("align", 24), ("held_out", 5)):
        assert f"{world / 'data' / name}.json: {count} records" in out
    assert "tokens a record" in out and not (world / "run").exists()
    changed = ["--config.data.max_length=80", "--config.data.images_per_row=1"]
    assert cli.main(["validate", f"--config={recipe_file()}", *changed]) == 0
    out = capsys.readouterr().out
    assert "left out when training: more images than images_per_row=1" in out
    assert "at max_length=80" in out


def test_a_recipe_names_columns(recipe_file, tmp_path, capsys):
    (tmp_path / "d.json").write_text('[{"query": "What?", "label": "A cat."}]')
    columns = "--config.data.columns={'question': 'query', 'answer': 'label'}"
    cli.main(["validate", str(tmp_path / "d.json"), f"--config={recipe_file()}", columns])
    assert "read as question and answer (1 records)" in capsys.readouterr().out


def test_a_recipe_for_other_data(recipe_file, world, capsys):
    other = world / "data/instruct.json"
    assert cli.main(["validate", str(other), f"--config={recipe_file()}"]) == 0
    out = capsys.readouterr().out
    assert f"{other}: 24 records" in out and "held_out" not in out


@pytest.mark.parametrize("changes, words", [
    ({"data.turns": "independent"}, "no faults"),
    ({"model.template": "plain"}, "not a caption"),
    ({"batch_size": 999}, "of the data as a whole"),
    ({"data.train": "TEXT", "data.validation": ""}, "would learn nothing"),
    ({"data.train": "MISSING"}, "missing image"),
    ({"data.train": "MISSING", "data.bad_image": "skip"}, "more than bad_image_ceiling=0"),
    ({"data.train": "MISSING", "data.bad_image": "skip", "data.bad_image_ceiling": 1},
     "left out when training: bad image"),
])  # fmt: skip
def test_a_recipe_decides_what_is_a_fault(
    recipe_file, world, run, tmp_path, capsys, changes, words
):
    items = [tiny_run.conversation(i) for i in range(6)]
    texts = [item for item in items if "image" not in item] * 3
    for item in texts:
        item["conversations"][0]["value"] = "What?"
    (tmp_path / "text.json").write_text(json.dumps(texts))
    items[0]["image"] = "missing.png"
    (tmp_path / "missing.json").write_text(json.dumps(items))
    files = {"TEXT": str(tmp_path / "text.json"), "MISSING": str(tmp_path / "missing.json")}
    changes = {key: files.get(value, value) for key, value in changes.items()}
    code = cli.main(["validate", f"--config={recipe_file(changes)}"])
    assert words in capsys.readouterr().out
    values = {"model.template": "chatml", "data.validation": str(world / "data/held_out.json")}
    values |= {"data.max_length": 320, "steps": 1} | changes
    try:
        run(tiny_run.align(world, tmp_path / "trained", values))
    except LlavaError:
        assert code == 1
    else:
        assert code == 0


def test_a_recipe_and_flags_that_contradict_it(recipe_file, capsys):
    file = f"--config={recipe_file()}"
    assert cli.main(["validate", file, "--template", "v1"]) == 1
    assert "the recipe decides template: leave out --template" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="unknown config key: data.max_lenght.*data.max_length"):
        cli.main(["validate", file, "--config.data.max_lenght=3"])
    with pytest.raises(SystemExit, match="no config file no.py"):
        cli.main(["validate", "--config=no.py"])
    assert cli.main(["validate", file, "--config.data.turns=each"]) == 1
    assert "data.turns is 'each'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["validate", "data.json", "--config.data.turns=each"])
    assert "unknown flag --config.data.turns" in capsys.readouterr().err
    assert cli.main(["validate"]) == 1
    assert "name a data file, or a recipe" in capsys.readouterr().err


def test_show_takes_a_recipe(recipe_file, capsys):
    assert cli.main(["show", f"--config={recipe_file()}", "--index", "2", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["template"] == "chatml" and shown["training"] == "used whole"
    (slot,) = shown["image_slots"]
    assert slot["image"] == "2.png" and slot["size"] == [12, 11] and slot["tiles"] == 1
    cut = ["--config.data.max_length=60"]
    assert cli.main(["show", f"--config={recipe_file()}", "--index", "2", *cut]) == 0
    assert "in training: left out: " in capsys.readouterr().out


@pytest.fixture
def leaky(data_set, tmp_path):
    """leaky(change of a picture): a held-out set whose second picture is record 1's, changed."""

    def leaky(change):
        folder = tmp_path / "held_out"
        folder.mkdir()
        photo(77).save(folder / "other.png")
        photo(1).save(data_set[1] / "a/1.png")
        change(photo(1)).save(folder / "same.png")
        items = [record(f"t{i}", "<image>\nWhat?", "yes", name) for i, name in
                 enumerate(("other.png", "same.png"))]  # fmt: skip
        (folder / "test.json").write_text(json.dumps(items))
        return folder

    return leaky


@pytest.mark.parametrize("change, kind", [
    (lambda picture: picture, "same "),
    (lambda picture: picture.resize((90, 70)), "near-duplicate"),
])  # fmt: skip
def test_pictures_of_a_held_out_set_are_found(data_set, leaky, command, capsys, change, kind):
    held_out = leaky(change) / "test.json"
    mixture = held_out.with_suffix(".yaml")
    mixture.write_text("datasets:\n  - json_path: test.json\n    image_root: .\n")
    arguments = [data_set[0], "--image_root", data_set[1]]
    assert command(validate_data, *arguments, "--against", mixture) == 1
    out = capsys.readouterr().out
    assert f"{mixture}: 1 of 2 pictures are in {data_set[0]}" in out and kind in out
    assert "record 1 (id 't1'" in out and "there = record 1 (id 'r1') here" in out
    (held_out.parent / "same.png").write_bytes(b"no picture")
    assert command(validate_data, *arguments, "--against", mixture) == 0
    out = capsys.readouterr().out
    assert "none of 1 pictures" in out and "1  records there could not be read" in out


def test_pictures_of_a_benchmark_are_found(data_set, leaky, tmp_path, capsys):
    folder = leaky(lambda picture: picture)
    (folder / "images").mkdir()
    for name in ("same.png", "other.png"):
        (folder / name).rename(folder / "images" / name)
    items = json.loads((folder / "test.json").read_text())
    (folder / "test.json").write_text(json.dumps([item | {"kind": "all"} for item in items]))
    config = tmp_path / "benchmark.py"
    config.write_text(
        "from configs.eval import easy_vqa\n\n\ndef get_config():\n"
        f"    config = easy_vqa.get_config()\n    config.data_root = {str(folder)!r}\n"
        "    config.options.split = 'test'\n    return config\n"
    )
    page = tmp_path / "report.html"
    arguments = ["validate", str(data_set[0]), "--image_root", str(data_set[1])]
    arguments += ["--report", str(page), "--against"]
    assert cli.main([*arguments, str(config)]) == 1
    out = capsys.readouterr().out
    assert "easy_vqa/test: 1 of 2 pictures" in out and "question 't1' there = record 1" in out
    assert f"report: {page}" in out and "same.png" in page.read_text()
    (folder / "images/same.png").unlink()
    assert cli.main([*arguments, str(config)]) == 1  # before any record is read
    assert "no image file" in capsys.readouterr().err


def test_held_out_data_of_the_recipe_are_compared_but_no_fault(recipe_file, capsys):
    assert cli.main(["validate", f"--config={recipe_file()}"]) == 0
    out = capsys.readouterr().out
    assert re.search(
        r"held_out.json: (\d) of \1 pictures are in .*align.json\n +\1  same bytes", out
    )


def test_a_report_that_cannot_be_written_is_refused_at_once(data_set, command, tmp_path):
    with pytest.raises(LlavaError, match="no folder .*missing to write r.html into"):
        command(validate_data, data_set[0], "--report", tmp_path / "missing/r.html")
