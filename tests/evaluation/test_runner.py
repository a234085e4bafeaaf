"""The runner on easy-VQA: its files, continuing after a kill, shards, and the command line."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import pytest

from llava_jax.errors import LlavaError
from llava_jax.evaluation import BENCHMARKS, runner, table
from llava_jax.evaluation.easy_vqa import load, normalize
from llava_jax.evaluation.runner import default_output, drop_answers, evaluate, unanswered
from llava_jax.files import locked
from llava_jax.inference.fingerprint import weights_fingerprint
from llava_jax.inference.model import Llava
from llava_jax.models.decoder import separate_layers
from llava_jax.models.precision import PRECISIONS
from llava_jax.models.quantization import pack_kernels
from llava_jax.parallel.mesh import make_mesh
from llava_jax.parallel.shares import Shard
from tests.tiny_model import CONFIG, byte_tokenizer, random_image, random_params, tiny_llava

ROOT = Path(__file__).parents[2]
KINDS = ["yes/no", "shape", "color"]


@pytest.fixture(scope="module")
def llava():
    return tiny_llava()


@pytest.fixture
def data(tmp_path):
    (tmp_path / "images").mkdir()
    records = []
    for i in range(11):
        random_image(i).save(tmp_path / "images" / f"{i}.png")
        question = f"question {i:02d}?"
        turns = [("human", f"<image>\n{question}"), ("gpt", "blue")]
        conversation = [{"from": role, "value": text} for role, text in turns]
        records.append({"id": f"q-{i}", "image": f"{i}.png", "conversations": conversation,
                        "question": question, "answer": "blue", "kind": KINDS[i % 3]})  # fmt: skip
    path = tmp_path / "test.json"
    path.write_text(json.dumps(records))
    blind = {"overall": {"accuracy": 0.5}, "shape": {"accuracy": 0.25}}
    (tmp_path / "blind.json").write_text(json.dumps({"test": blind}))
    return path


def predictions(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").open()]


def run(llava, data, out, **options):
    settings = {"max_new_tokens": 4, "batch_size": 1, **options}
    return evaluate(llava, load(data.parent, "test"), out, **settings)


def test_the_metric_ignores_case_space_and_a_full_stop_only(data):
    assert normalize(" Blue. \n") == normalize("blue") == "blue"
    assert normalize("light blue") != "blue" and normalize("blue!") != "blue"
    right = ["blue", "Blue.", " BLUE "] * 3 + ["red", "blue is"]
    benchmark = load(data.parent, "test")
    scores = {score.kind: score for score in benchmark.score(benchmark.questions, right)}
    assert list(scores) == [*KINDS, "overall"]
    assert [scores[kind].count for kind in scores] == [4, 4, 3, 11]
    assert scores["yes/no"].values == {"accuracy": 75}
    assert scores["overall"].values == {"accuracy": pytest.approx(900 / 11), "blind": 50}
    assert scores["shape"].values["blind"] == 25 and "blind" not in scores["color"].values
    text = table(list(scores.values()))
    assert "81.8" in text and "50.0" in text and "overall" in text


def test_yes_no_questions_have_their_share_of_yes_and_of_false_yes(data):
    records = json.loads(data.read_text())
    for record, answer in zip(records[::3], ("yes", "no", "no", "yes"), strict=True):
        record["answer"] = record["conversations"][1]["value"] = answer
    data.write_text(json.dumps(records))
    benchmark = load(data.parent, "test")
    answers = ["blue"] * 11
    answers[::3] = "Yes.", "yes", "no", "no"  # of the two that are no, one is called yes
    lines = {line.kind: line for line in benchmark.score(benchmark.questions, answers)}
    assert lines["yes/no"].values == {"accuracy": 50, "yes": 50, "false yes": 50}
    assert lines["yes/no"].errors["false yes"] == pytest.approx(50 / 2**0.5)
    assert "yes" not in lines["shape"].values and "yes" not in lines["overall"].values


def test_predictions_are_the_models_answers_in_order(llava, data, tmp_path):
    out = tmp_path / "out"
    scores = run(llava, data, out)
    lines = predictions(out)
    assert [line["id"] for line in lines] == [f"q-{i}" for i in range(11)]
    images = [data.parent / "images" / f"{i}.png" for i in range(11)]
    questions = [f"question {i:02d}?" for i in range(11)]
    expected = llava.generate(questions, images=images, max_new_tokens=4, batch_size=1)
    assert [line["prediction"] for line in lines] == expected
    assert lines[3] == {"id": "q-3", "question": "question 03?", "prediction": expected[3],
                        "reference": "blue", "image": "3.png", "grade": 0.0}  # fmt: skip
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["benchmark"] == "easy_vqa/test"
    assert metrics["scores"]["overall"]["count"] == 11 == scores[-1].count


def test_an_interrupted_run_continues_and_ends_with_the_same_file(
    llava, data, tmp_path, monkeypatch
):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(llava, data, whole)
    monkeypatch.setattr(runner, "BATCHES_AT_A_TIME", 2)
    asked, answer = [], llava.answers

    def killed(requests, batch_size, progress):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(len(requests))
        return answer(requests, batch_size, progress)

    monkeypatch.setattr(llava, "answers", killed)
    with pytest.raises(KeyboardInterrupt):
        run(llava, data, cut)
    path = cut / "predictions.jsonl"
    assert len(predictions(cut)) == 4 and not (cut / "metrics.json").exists()
    # A kill may cut a line anywhere, also inside a character.
    path.write_bytes(path.read_bytes() + '{"id": "q-4", "prediction": "青'.encode()[:-1])
    monkeypatch.setattr(llava, "answers", answer)
    run(llava, data, cut)
    for name in ("predictions.jsonl", "metrics.json", "run.json"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()


def test_lines_of_another_form_are_asked_again(llava, data, tmp_path):
    run(llava, data, tmp_path / "out")
    path = tmp_path / "out" / "predictions.jsonl"
    whole = path.read_bytes()
    first = whole.split(b"\n")[0] + b"\n"
    for line in (b"5\n", b"[]\n", b'{"id": "q-1"}\n', b'{"id": [], "prediction": "a"}\n'):
        path.write_bytes(first + line)
        run(llava, data, tmp_path / "out")
        assert path.read_bytes() == whole
    path.with_name("run.json").write_text("[]")
    with pytest.raises(LlavaError, match="answers of another run"):
        run(llava, data, tmp_path / "out")


def test_shards_together_are_the_whole_run(llava, data, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    scores = run(llava, data, whole)
    for index in (3, 1):
        assert run(llava, data, parts, shard=Shard(index, 3)) == []
    assert [line["id"] for line in predictions(parts / "shard-3-of-3")] == [
        f"q-{i}" for i in (7, 8, 9, 10)
    ]
    assert not (parts / "metrics.json").exists()
    # A shard that is still writing is taken as far as its lines are whole, and left alone.
    unfinished = parts / "shard-3-of-3" / "predictions.jsonl"
    unfinished.write_bytes(unfinished.read_bytes()[:-4])
    cut = unfinished.read_bytes()
    asked, answer = [], llava.answers

    def counting(requests, *rest):
        asked.append(len(requests))
        return answer(requests, *rest)

    monkeypatch.setattr(llava, "answers", counting)
    assert run(llava, data, parts) == scores
    assert sum(asked) == 4 + 1 and unfinished.read_bytes() == cut
    for name in ("predictions.jsonl", "metrics.json", "run.json"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes()


def test_a_shard_asks_what_no_shard_of_any_number_has_answered(llava, data, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(llava, data, whole)
    benchmark = load(data.parent, "test")
    assert unanswered(benchmark, parts) == 11
    for index in (1, 3):
        run(llava, data, parts, shard=Shard(index, 3))  # questions 0 to 2 and 7 to 10
    assert unanswered(benchmark, parts) == 4
    asked, answer = [], llava.answers

    def counting(requests, *rest):
        asked.append(len(requests))
        return answer(requests, *rest)

    monkeypatch.setattr(llava, "answers", counting)
    for index in (1, 2):
        run(llava, data, parts, shard=Shard(index, 2))  # 0 to 4, 5 to 10
    assert asked == [2, 2] and unanswered(benchmark, parts) == 0
    run(llava, data, parts)
    assert asked == [2, 2]
    assert (parts / "predictions.jsonl").read_bytes() == (whole / "predictions.jsonl").read_bytes()
    with pytest.raises(LlavaError, match=r"another run \(different: max_new_tokens"):
        run(llava, data, parts, shard=Shard(1, 4), max_new_tokens=5)
    drop_answers(parts)
    assert unanswered(benchmark, parts) == 11 and not (parts / "metrics.json").exists()
    run(llava, data, parts, shard=Shard(1, 4), max_new_tokens=5)


def test_a_limited_run_has_a_folder_name_of_its_own(llava, data, tmp_path):
    benchmark = load(data.parent, "test")
    first = benchmark.first(4)
    assert first.name == "easy_vqa/test-first-4" and len(first.questions) == 4
    assert evaluate(llava, first, tmp_path / "out", 4, 1)[-1].count == 4
    with pytest.raises(LlavaError, match=r"different: benchmark, questions"):
        run(llava, data, tmp_path / "out")


def test_a_finished_run_asks_nothing_again(llava, data, tmp_path, monkeypatch):
    run(llava, data, tmp_path / "out")
    before = (tmp_path / "out" / "metrics.json").read_bytes()
    monkeypatch.setattr(llava, "answers", None)
    run(llava, data, tmp_path / "out")
    assert (tmp_path / "out" / "metrics.json").read_bytes() == before


def test_two_runs_do_not_write_to_one_folder(llava, data, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with locked(out, "busy"):
        with pytest.raises(LlavaError, match="another eval.py is writing to .*out now"):
            run(llava, data, out)
        run(llava, data, out, shard=Shard(1, 2))  # a shard has a folder of its own
    run(llava, data, out)
    assert len(predictions(out)) == 11


def test_answers_of_another_run_are_refused(llava, data, tmp_path, monkeypatch):
    out = tmp_path / "out"
    run(llava, data, out)
    with pytest.raises(LlavaError, match=r"another run \(different: max_new_tokens\)"):
        run(llava, data, out, max_new_tokens=5)
    with pytest.raises(LlavaError, match=r"another run \(different: kv_cache\)"):
        run(llava, data, out, settings={"kv_cache": "int8", "template_given": None})
    other = tiny_llava(seed=1)
    with pytest.raises(LlavaError, match=r"another run \(different: weights\)"):
        run(other, data, out)
    red = types.SimpleNamespace(text="red")
    monkeypatch.setattr(llava, "answers", lambda requests, *_: [[red]] * len(requests))
    run(llava, data, out, overwrite=True)
    assert {line["prediction"] for line in predictions(out)} == {"red"}
    records = json.loads(data.read_text())
    data.write_text(json.dumps(records[:5]))
    with pytest.raises(LlavaError, match=r"another run \(different: questions\)"):
        run(llava, data, out)


def test_a_bad_image_is_reported_with_its_question_and_spares_what_was_answered(
    llava, data, tmp_path
):
    (data.parent / "images" / "9.png").write_bytes(b"not an image")
    with pytest.raises(LlavaError, match=r"question 9 \(q-9\): .*9\.png"):
        run(llava, data, tmp_path / "out")
    assert len(predictions(tmp_path / "out")) == 8


def test_records_that_are_no_questions_are_refused(data):
    records = json.loads(data.read_text())
    for change, message in [
        ({"kind": None}, r"record 2 \(id 'q-2'\): expected one question"),
        ({"image": "gone.png"}, r"record 2 \(id 'q-2'\).*gone.png"),
    ]:
        data.write_text(json.dumps([*records[:2], {**records[2], **change}]))
        with pytest.raises(LlavaError, match=message):
            load(data.parent, "test")


def test_the_fingerprint_sees_every_value_and_no_device_layout():
    params = random_params(CONFIG)
    first = weights_fingerprint(params)
    assert first == weights_fingerprint(random_params(CONFIG))
    layer = params["decoder"]["layers"]["mlp"]["up_proj"]
    kernel = layer["kernel"]
    layer["kernel"] = kernel.at[0, 0, 0].set(kernel[0, 0, 1]).at[0, 0, 1].set(kernel[0, 0, 0])
    assert weights_fingerprint(params) != first
    layer["kernel"] = kernel
    spread = jax.sharding.Mesh(jax.devices(), "x")
    whole = jax.sharding.NamedSharding(spread, jax.sharding.PartitionSpec())
    assert weights_fingerprint(jax.device_put(params, whole)) == first


@pytest.mark.parametrize(
    "dtype, weights", [("float32", None), ("mixed", None), ("bfloat16", "int8")]
)
def test_the_fingerprint_is_that_of_a_mesh_and_of_layers_by_themselves(dtype, weights):
    arrays, products = PRECISIONS[dtype]
    params = jax.tree.map(lambda leaf: leaf.astype(arrays), random_params(CONFIG))
    settings = {"dtype": dtype, "quantize": weights}
    make = lambda params, mesh=None: Llava(
        CONFIG, params, byte_tokenizer(), "chatml", **settings, mesh=mesh
    )
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    alone = {**params, "decoder": separate_layers(params["decoder"])}
    if weights is None and "bfloat16" in (arrays, products):
        alone = pack_kernels(alone)
    models = make(params), make(params, mesh), make(alone)
    first, *others = (weights_fingerprint(model.engine.params, dtype) for model in models)
    assert others == [first, first]
    norm = params["decoder"]["norm"]["scale"]
    params["decoder"]["norm"]["scale"] = norm.at[0].set(norm[0] + 1)
    assert weights_fingerprint(make(params).engine.params, dtype) != first


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config.batch_sizes=3"], "unknown config key: batch_sizes, did you mean batch_size"),
        (["--config.batch_size=many"], "batch_size"),
        (["--config.benchmark=mmlu"], "unknown benchmark 'mmlu': choose one of easy_vqa"),
        (["--config.data_root=no/such"], "no/such/test_1000.json is missing: it is published"),
        (["--shard=0/4"], "--shard must be i/n with i from 1 to n, such as 1/4, not '0/4'"),
        (
            ["--limit=0", "--config.data_root=DATA", "--config.options.split=test"],
            "--limit must be at least 1",
        ),
        (["--nonsense"], "nonsense"),
        (["stray"], "unexpected argument 'stray'"),
    ],
)
def test_wrong_command_lines_are_reported_in_a_sentence(arguments, message, data):
    arguments = [argument.replace("DATA", str(data.parent)) for argument in arguments]
    command = [sys.executable, "eval.py", "--config=configs/eval/easy_vqa.py", "--checkpoint=none"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and message in done.stderr
    assert "Traceback" not in done.stderr


def test_results_are_stored_with_the_checkpoint_and_never_hide_a_name_of_the_hub(
    tmp_path, monkeypatch
):
    step = tmp_path / "checkpoints" / "4"
    step.mkdir(parents=True)
    assert default_output(str(tmp_path)) == default_output(str(step)) == tmp_path / "eval"
    monkeypatch.chdir(tmp_path)
    assert default_output("llava-hf/llava-1.5-7b-hf") == Path("runs/llava-1.5-7b-hf/eval")


def test_every_benchmark_has_a_config():
    names = {path.stem for path in (ROOT / "configs" / "eval").glob("*.py")}
    assert set(BENCHMARKS) <= names - {"base"}


def predictions_on_one_device(checkpoint: Path, data: Path, tmp_path: Path) -> list[dict]:
    run(Llava.from_pretrained(checkpoint, dtype="auto"), data, tmp_path / "one", max_new_tokens=8)
    return predictions(tmp_path / "one")


def test_eval_answers_scores_and_reports(data, tmp_path, aligned):
    """The command on a run of train.py: the whole, then a part on other shares of the devices."""
    command = [sys.executable, "eval.py", "--config=configs/eval/easy_vqa.py"]
    command += [f"--checkpoint={aligned}", f"--output={tmp_path / 'out'}"]
    command += [f"--config.data_root={data.parent}", "--config.options.split=test"]
    for devices, arguments, text in [
        (2, [], "easy_vqa/test: overall accuracy 0.0 ±0.0 (none published)"),
        (
            4,
            ["--limit=3", "--config.mesh.tensor=2", "--replicas=1"],
            "easy_vqa/test-first-3: overall accuracy 0.0 ±0.0 (none published)",
        ),
        (1, ["--limit=2", "--template=v1", "--kv_cache=int8"], "easy_vqa/test-first-2: overall"),
    ]:
        flags = os.environ["XLA_FLAGS"] + f" --xla_force_host_platform_device_count={devices}"
        done = subprocess.run(
            [*command, *arguments], capture_output=True, text=True, cwd=ROOT,
            env=os.environ | {"XLA_FLAGS": flags},
        )  # fmt: skip
        assert done.returncode == 0 and text in done.stdout, done.stderr
    out = tmp_path / "out" / "easy_vqa"
    whole = predictions(out / "test")
    assert len(whole) == 11 and predictions(out / "test-first-3") == whole[:3]
    assert whole == predictions_on_one_device(aligned, data, tmp_path)
    marks = [json.loads((out / f"test{name}/run.json").read_text()) for name in ("", "-first-2")]
    assert [mark["template"] for mark in marks] == ["plain", "v1"]
    assert [mark["kv_cache"] for mark in marks] == [None, "int8"]
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| easy_vqa/test | 11 | accuracy, overall | 0.0 ±0.0 |  |  |" in report
    assert set(json.loads((tmp_path / "out" / "report.json").read_text())) == {
        "easy_vqa/test",
        "easy_vqa/test-first-2",
        "easy_vqa/test-first-3",
    }
    assert "11 of 11 answers" in (tmp_path / "out/easy_vqa/test/failures.html").read_text()
