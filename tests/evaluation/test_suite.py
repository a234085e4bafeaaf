"""A suite of benchmarks: those whose files are there, and one table over all."""

import importlib
import json

import pytest

from llava_jax.errors import LlavaError
from llava_jax.evaluation import BENCHMARKS, load_configured
from llava_jax.evaluation.report import HALLUCINATION, hallucination_table
from tests.evaluation.published import write


def hallucination(root):
    config = importlib.import_module("configs.eval.hallucination").get_config()
    config.data_root = str(root)
    config.batch_size = 5
    return config


def test_the_suite_runs_those_whose_files_are_there(tmp_path, capsys):
    config = hallucination(tmp_path)
    with pytest.raises(LlavaError, match=r"no benchmark of pope, repope, .* has its files below"):
        load_configured(config)
    item = {"category": "VS", "subcategory": "map", "visual_input": "0", "set_id": "1",
            "figure_id": "0", "question_id": "0", "question": "Is it?",
            "gt_answer": "1"}  # fmt: skip
    write(tmp_path, "hallusionbench/HallusionBench.json", [item, item | {"question_id": "1"}])
    write(tmp_path, "mmvp/Questions.csv",
          "lndex,Question,Options,Correct Answer\n1,Open?,(a) Open (b) Closed,(a)\n")  # fmt: skip
    ((member, benchmark),) = load_configured(config, limit=1)
    assert benchmark.name == "hallusionbench-first-1" and member.batch_size == 5
    out = capsys.readouterr().out
    assert "pope is left out: " in out and "coco_pope_adversarial.json is missing: it is" in out
    assert "mmvp is left out: 1 of 1 pictures are missing" in out
    # A file that is there but damaged is an error, not a benchmark to leave out.
    write(tmp_path, "hallusionbench/HallusionBench.json", "{")
    with pytest.raises(LlavaError, match="cannot read .*HallusionBench.json"):
        load_configured(config)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("max_new_tokens", 64, "config.max_new_tokens is not used by a suite, whose members have"),
        ("benchmark", "pope", "config.benchmark is not used by a suite"),
        ("suite", ("pop",), "unknown member 'pop' of config.suite: choose of easy_vqa"),
    ],
)
def test_a_value_that_a_suite_would_ignore_is_refused(tmp_path, key, value, message):
    config = hallucination(tmp_path)
    config[key] = value
    with pytest.raises(LlavaError, match=message):
        load_configured(config)


@pytest.mark.parametrize("suite", ["hallucination", "llava15", "onevision", "videos"])
def test_every_member_of_a_suite_has_a_config_and_a_folder(suite):
    for name in importlib.import_module(f"configs.eval.{suite}").get_config().suite:
        member = importlib.import_module(f"configs.eval.{name}").get_config()
        assert member.benchmark in BENCHMARKS
        assert member.data_root.startswith("data/eval/") and member.data_root.count("/") == 2


def test_every_member_is_a_hallucination_benchmark_with_a_config_of_its_own(tmp_path):
    config = hallucination(tmp_path)
    assert set(config.suite) == set(HALLUCINATION)
    for name in config.suite:
        member = importlib.import_module(f"configs.eval.{name}").get_config()
        assert member.benchmark == name and member.data_root == f"data/eval/{name}"


def test_one_table_over_all_hallucination_benchmarks(tmp_path):
    for folder, name, values in [
        ("pope", "pope", {"F1": 85.9, "false yes": 10.0}),
        ("amber-first-9", "amber-first-9", {"F1 of no": 70.0}),
        ("gqa", "gqa", {"accuracy": 60.0}),
    ]:
        metrics = {"benchmark": name, "answers": 9, "scores": {"mean": {"count": 9, **values}},
                   "standard_errors": {"mean": {"F1": 0.5}}}  # fmt: skip
        write(tmp_path, f"{folder}/metrics.json", json.dumps(metrics))
        write(tmp_path, f"{folder}/run.json", "{}")
    head, *rows = (line.split() for line in hallucination_table(tmp_path).splitlines())
    assert head == ["hallucination", "n", "metric", "score", "yes", "false", "yes"]
    assert rows == [
        ["amber-first-9", "9", "F1", "of", "no", "70.0"],
        ["pope", "9", "F1", "85.9", "±0.5", "10.0"],
    ]
    assert hallucination_table(tmp_path / "gqa") == ""
