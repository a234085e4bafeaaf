"""`llava-jax serve` under Ray Serve: N replicas answer like the model; one is killed in between."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import yaml

from llava_jax.errors import LlavaError
from llava_jax.inference.model import Llava
from tests.ray_cluster import ROOT, ray_cluster
from tests.serving.live_server import data_url, question
from tests.tiny_model import random_image

ray = pytest.importorskip("ray", reason="needs the ray extra")
from ray import serve  # noqa: E402
from ray.serve.schema import ServeDeploySchema  # noqa: E402

from llava_jax.serving.ray_serve import Llava as Deployed  # noqa: E402
from llava_jax.serving.ray_serve import application, bind  # noqa: E402

SAMPLING = {"max_tokens": 12, "temperature": 0.0}
IGNORE = {"ignore_eos": True}


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"checkpoint": "x", "port": 80}, "port is no argument under Ray Serve"),
        ({"checkpoint": "x", "batch_sise": 8}, "did you mean 'batch_size'"),
        ({"checkpoint": "x", "batch_size": 0}, "--batch_size and --max_queue must be at least 1"),
        ({}, "required: --checkpoint"),
    ],
)
def test_arguments_that_are_wrong_are_refused_before_anything_starts(arguments, words):
    with pytest.raises(LlavaError, match=words):
        application(arguments)


def test_the_config_of_the_page_names_what_there_is():
    page = (ROOT / "docs/run_on/ray.md").read_text(encoding="utf-8")
    config = yaml.safe_load(page.split("```yaml\n")[1].split("```")[0])
    (described,) = ServeDeploySchema.model_validate(config).applications
    assert described.import_path == f"{application.__module__}:{application.__name__}"
    deployment = application(described.args)._bound_deployment
    assert [one.name for one in described.deployments] == [deployment.name]
    seconds = deployment._deployment_config.graceful_shutdown_timeout_s
    assert seconds == described.args["drain_seconds"]
    assert deployment.max_ongoing_requests == deployment.max_queued_requests == 128


def test_the_health_of_a_replica_is_its_engines():
    worker = SimpleNamespace(failed=False)
    replica = SimpleNamespace(server=SimpleNamespace(worker=worker))
    Deployed.func_or_class.check_health(replica)
    worker.failed = True
    with pytest.raises(RuntimeError, match="the engine failed for good"):
        Deployed.func_or_class.check_health(replica)


def replicas() -> dict:
    """name -> actor of the replicas that run."""
    names = ray.util.list_named_actors(all_namespaces=True)
    names = [one["name"] for one in names if one["name"].startswith("SERVE_REPLICA::")]
    return {name: ray.get_actor(name, namespace="serve") for name in names}


@pytest.mark.slow
def test_replicas_answer_and_one_is_killed(aligned):
    from openai import OpenAI

    model = Llava.from_pretrained(aligned, template="chatml")
    url, picture = data_url(0), random_image(0)
    questions = [f"{i}?" for i in range(24)]
    wanted = model.generate(
        questions, [picture if i % 2 else None for i in range(24)], **SAMPLING | IGNORE
    )
    with ray_cluster(2):
        serve.start(http_options={"port": 8123, "location": "HeadOnly"})
        arguments = {"checkpoint": str(aligned), "name": "tiny", "batch_size": 4}
        arguments |= {"max_model_len": 128, "template": "chatml"}
        serve.run(bind(arguments, num_replicas=2))
        client = OpenAI(base_url="http://127.0.0.1:8123/v1", api_key="x", max_retries=8)
        assert [card.id for card in client.models.list()] == ["tiny"]

        def ask(number: int) -> str:
            images = [url] if number % 2 else []
            answer = client.chat.completions.create(
                model="tiny", messages=[question(questions[number], *images)], **SAMPLING,
                extra_body=IGNORE,
            )  # fmt: skip
            return answer.choices[0].message.content

        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(ask, range(24))) == wanted
            before = replicas()
            assert len(before) == 2
            killer = threading.Timer(0.3, lambda: ray.kill(next(iter(before.values()))))
            killer.start()
            assert list(pool.map(ask, [*range(24)] * 3)) == wanted * 3
        deadline = time.monotonic() + 120
        while len({*replicas()} - {next(iter(before))}) < 2:  # it is replaced
            assert time.monotonic() < deadline
            time.sleep(0.5)
        # Deleting drains: a stream that runs goes on to its end.
        stream = client.chat.completions.create(
            model="tiny", messages=[question("long?")], max_tokens=90, stream=True,
            temperature=0, extra_body=IGNORE,
        )  # fmt: skip
        pieces = iter(stream)
        next(pieces)
        deleting = threading.Thread(target=serve.delete, args=["default"])
        deleting.start()
        rest = [choice for piece in pieces for choice in piece.choices]
        deleting.join()
        assert rest[-1].finish_reason == "length"
        assert not replicas()
        serve.shutdown()
