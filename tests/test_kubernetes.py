"""The manifests of docs/run_on/kubernetes: they name flags, addresses and labels that exist."""

import re
from pathlib import Path

import pytest
import yaml

from llava_jax.cli import Parser
from llava_jax.serving import serve
from llava_jax.serving.app import Options, Server
from llava_jax.serving.guards import OPEN_PATHS

FOLDER = Path(__file__).parent.parent / "docs/run_on/kubernetes"
MANIFESTS = {
    path.stem: list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
    for path in sorted(FOLDER.glob("*.yaml"))
}
SERVING = ("gpu", "tpu", "kserve")
ROUTES = {route.path: route.methods for route in Server(Options(["x"]), "0").app.routes}


def only(manifest: str, kind: str) -> dict:
    """The one object of a kind."""
    (found,) = [one for one in MANIFESTS[manifest] if one["kind"] == kind]
    return found


def pod(manifest: str) -> tuple[dict, dict]:
    """(labels, spec) of the pods that serve."""
    if manifest == "kserve":
        service = only(manifest, "InferenceService")
        return service["metadata"]["labels"], service["spec"]["predictor"]
    template = only(manifest, "Deployment")["spec"]["template"]
    return template["metadata"]["labels"], template["spec"]


def arguments(container: dict):
    """The flags of a container, as the command reads them."""
    assert container["command"] == ["llava-jax", "serve"]
    parser = Parser(prog="serve", exit_on_error=False)
    serve.add_arguments(parser)
    args = parser.parse_args(container["args"])
    serve.check_arguments(args)
    return args


@pytest.mark.parametrize("manifest", SERVING)
def test_flags_probes_and_times_are_the_servers(manifest):
    _, spec = pod(manifest)
    (container,) = spec["containers"]
    args = arguments(container)
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert args.host == "0.0.0.0" and ports == {"http": args.port}
    probes = {
        name: container[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")
    }
    assert {name: probe["path"] for name, probe in probes.items()} == {
        "startup": "/ready", "readiness": "/ready", "liveness": "/health",
    }  # fmt: skip
    for probe in probes.values():
        assert "GET" in ROUTES[probe["path"]] and probe["path"] in OPEN_PATHS
        assert probe["port"] in ports
    sleep = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    # uvicorn closes connections for 5 seconds more, and the engine's thread is waited for as long.
    assert spec["terminationGracePeriodSeconds"] >= sleep + args.drain_seconds + 10
    volumes = {volume["name"] for volume in spec["volumes"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert {*mounts} == volumes and args.checkpoint.startswith(mounts["shared"])
    limits = container["resources"]["limits"]
    devices = int(limits.get("nvidia.com/gpu") or limits["google.com/tpu"])
    assert devices == args.replicas * args.tensor


@pytest.mark.parametrize("manifest", ["gpu", "tpu"])
def test_the_service_finds_the_pods_and_the_server_knows_its_names(manifest):
    labels, spec = pod(manifest)
    service, deployment = only(manifest, "Service"), only(manifest, "Deployment")
    assert deployment["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert service["spec"]["selector"].items() <= labels.items()
    (port,) = service["spec"]["ports"]
    assert port["targetPort"] in [one["name"] for one in spec["containers"][0]["ports"]]
    ends = ("", ".default", ".default.svc", ".default.svc.cluster.local")
    names = [service["metadata"]["name"] + end for end in ends]
    assert arguments(spec["containers"][0]).allowed_hosts == names


@pytest.mark.parametrize("manifest", SERVING)
def test_what_is_scraped_and_routed_is_there(manifest):
    labels, spec = pod(manifest)
    monitor = only("metrics", "PodMonitor")["spec"]
    assert monitor["selector"]["matchLabels"].items() <= labels.items()
    (endpoint,) = monitor["podMetricsEndpoints"]
    (port,) = spec["containers"][0]["ports"]
    assert endpoint["port"] == port["name"] and "GET" in ROUTES[endpoint["path"]]


def test_the_gateway_leads_to_the_pool_of_the_chart_and_that_to_the_pods():
    page = FOLDER.with_suffix(".md").read_text(encoding="utf-8")
    release, label = re.search(r"helm install (\w+) .*?matchLabels.app=(\w+)", page, re.S).groups()
    labels, spec = pod("gpu")
    (port,) = spec["containers"][0]["ports"]
    assert labels["app"] == label and port["containerPort"] == 8000  # the chart's
    route, gateway = only("gateway", "HTTPRoute"), only("gateway", "Gateway")
    assert route["spec"]["parentRefs"] == [{"name": gateway["metadata"]["name"]}]
    (rule,) = route["spec"]["rules"]
    pool = {"group": "inference.networking.k8s.io", "kind": "InferencePool", "name": release}
    assert (
        rule["backendRefs"] == [only("gateway", "GCPBackendPolicy")["spec"]["targetRef"]] == [pool]
    )
    (match,) = rule["matches"]
    assert any(path.startswith(match["path"]["value"]) for path in ROUTES)


def test_the_gauges_that_pickers_read_have_the_names_that_the_page_gives():
    page = FOLDER.with_suffix(".md").read_text(encoding="utf-8")
    text = Server(Options(["x"]), "0").metrics.text().decode()
    for name in ("vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"):
        assert f"`{name}`" in page and f"# TYPE {name} gauge" in text


def test_every_manifest_is_on_the_page():
    page = FOLDER.with_suffix(".md").read_text(encoding="utf-8")
    assert all(f"(kubernetes/{name}.yaml)" in page for name in MANIFESTS)


@pytest.mark.slow
@pytest.mark.parametrize("manifest", ["gpu", "tpu"])
def test_the_schema_of_kubernetes(manifest):
    schemas = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate")
    for one in MANIFESTS[manifest]:
        schemas.validate(one, schemas.latest_version(), strict=True)
