"""`scripts/deploy`: flags that the command knows, ports and folders that agree, metrics that the server has."""

import ast
import configparser
import json
import re
import shutil
import subprocess
from importlib.metadata import requires
from pathlib import Path

import pytest
import yaml

from qjax.cli import make_parser
from qjax.cli.options import with_dashes
from qjax.config import ServerConfig
from qjax.engine.metrics import Metrics
from qjax.server.app import ROUTES
from qjax.server.lifecycle import FLUSH_SECONDS, SHUTDOWN_SECONDS
from qjax.server.ray_config import check_fits_ray, read_args

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "scripts" / "deploy"
PORT = ServerConfig().port
DOCKERFILE = (FOLDER / "Dockerfile").read_text()


def load(name: str) -> list[dict]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


def of_kind(kind: str, name: str = "kubernetes.yaml") -> dict:
    (found,) = (document for document in load(name) if document["kind"] == kind)
    return found


def serve_options(arguments: list[str]):
    """What `qjax serve` reads of a command line; unknown flags are an error."""
    args, unknown = make_parser().parse_known_args(with_dashes(arguments))
    assert not unknown and args.command == "serve"
    return args


POD = of_kind("Deployment")["spec"]["template"]["spec"]
CONTAINER = POD["containers"][0]
RAY = of_kind("RayService", "rayservice.yaml")["spec"]
SERVE = yaml.safe_load(RAY["serveConfigV2"])
RAY_PODS = [RAY["rayClusterConfig"]["headGroupSpec"], *RAY["rayClusterConfig"]["workerGroupSpecs"]]
RAY_CONTAINERS = [pod["template"]["spec"]["containers"][0] for pod in RAY_PODS]


def test_the_image_has_what_setuptools_packs():
    copied = {word for line in re.findall(r"^COPY (.*) \S+$", DOCKERFILE, re.M) for word in line.split()}
    ignored = (FOLDER / "Dockerfile.dockerignore").read_text().splitlines()
    assert copied == {line[1:] for line in ignored if line.startswith("!")}
    assert copied >= {"pyproject.toml", "README.md", "LICENSE", "qjax", "kernels", "server"}
    assert all((ROOT / name).exists() for name in copied)


def test_the_image_names_no_registry():
    images = [CONTAINER["image"], *(c["image"] for c in RAY_CONTAINERS)]
    assert {re.fullmatch(r"qjax:[\w.-]+", image) is not None for image in images} == {True}
    assert re.findall(r"^FROM (\S+)", DOCKERFILE, re.M) == ["nvidia/cuda:${CUDA_TAG}"]


def test_nobody_is_root():
    user = re.search(r"^USER (\d+)", DOCKERFILE, re.M)
    assert user and f"useradd --uid {user[1]}" in DOCKERFILE
    context = POD["securityContext"]
    assert context["runAsNonRoot"] and {context[n] for n in ("runAsUser", "runAsGroup", "fsGroup")} == {int(user[1])}


def test_ports_agree():
    assert re.findall(r"^EXPOSE (\d+)", DOCKERFILE, re.M) == [str(PORT)]
    assert f"http://localhost:{PORT}/health" in DOCKERFILE
    assert CONTAINER["ports"] == [{"name": "http", "containerPort": PORT}]
    assert of_kind("Service")["spec"]["ports"] == [{"name": "http", "port": PORT, "targetPort": "http"}]
    assert "port" not in serve_options(CONTAINER["args"])
    assert SERVE["http_options"]["port"] == PORT
    for container in RAY_CONTAINERS:
        assert {"name": "serve", "containerPort": PORT} in container["ports"]
    (job,) = load("prometheus.yml")[0]["scrape_configs"]
    assert job["static_configs"] == [{"targets": [f"localhost:{PORT}"]}]
    assert job["metrics_path"] in {route.path for route in ROUTES}


def test_labels_select_the_pods():
    labels = of_kind("Deployment")["spec"]["template"]["metadata"]["labels"]
    assert of_kind("Deployment")["spec"]["selector"]["matchLabels"] == labels == of_kind("Service")["spec"]["selector"]


def test_volumes_are_where_the_image_keeps_things():
    kept = set(json.loads(re.search(r"^VOLUME (.*)$", DOCKERFILE, re.M)[1]))
    named = dict(re.findall(r"^\s*(?:ENV )?(HF_HOME|QJAX_CACHE_DIR)=(\S+)", DOCKERFILE, re.M))
    assert kept == set(named.values()) and len(named) == 2
    for container in (CONTAINER, RAY_CONTAINERS[1]):
        assert {mount["mountPath"] for mount in container["volumeMounts"]} == kept
    claims = {document["metadata"]["name"] for document in load("kubernetes.yaml") if "Claim" in document["kind"]}
    assert {volume["persistentVolumeClaim"]["claimName"] for volume in POD["volumes"]} == claims


def test_probes():
    paths = {route.path for route in ROUTES if route.is_open and route.method == "GET"}
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert CONTAINER[name]["httpGet"]["path"] in paths and CONTAINER[name]["httpGet"]["port"] == "http"
    startup = CONTAINER["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 1800  # a cold download and compilation


def test_there_is_time_to_drain():
    given = serve_options(CONTAINER["args"]).shutdown_timeout
    rest = given + FLUSH_SECONDS + SHUTDOWN_SECONDS
    assert POD["terminationGracePeriodSeconds"] > rest + CONTAINER["lifecycle"]["preStop"]["sleep"]["seconds"]
    unit = service()
    arguments = unit["Service"]["execstart"].split()[1:]
    given = serve_options(arguments).shutdown_timeout
    assert int(unit["Service"]["timeoutstopsec"]) > given + FLUSH_SECONDS + SHUTDOWN_SECONDS
    assert serve_options(arguments).port == PORT


def service() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.read(FOLDER / "qjax.service")
    return parser


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd here")
def test_systemd_takes_the_unit(tmp_path):
    text = (FOLDER / "qjax.service").read_text().replace("/opt/qjax/venv/bin/qjax", "/bin/true")
    (tmp_path / "qjax.service").write_text(text)
    done = subprocess.run(["systemd-analyze", "verify", tmp_path / "qjax.service"], capture_output=True, text=True)
    assert done.returncode == 0 and "qjax.service" not in done.stderr, done.stderr


def test_the_ray_service_has_options_that_exist():
    (app,) = SERVE["applications"]
    engine, server, ray = read_args(app["args"])
    check_fits_ray(engine, server)
    module, _, function = app["import_path"].partition(":")
    source = ROOT / (module.removeprefix("qjax.").replace(".", "/") + ".py")
    assert function in {node.name for node in ast.parse(source.read_text()).body if isinstance(node, ast.FunctionDef)}
    (workers,) = RAY["rayClusterConfig"]["workerGroupSpecs"]
    limits = RAY_CONTAINERS[1]["resources"]["limits"]
    assert workers["maxReplicas"] == ray.max_replicas and workers["minReplicas"] == ray.min_replicas
    assert limits["nvidia.com/gpu"] == ray.num_gpus and int(limits["cpu"]) >= ray.num_cpus
    least = re.search(r"^ray\[serve\]>=([\d.]+),<3", "\n".join(requires("qjax") or []), re.M)
    assert least is None or RAY["rayClusterConfig"]["rayVersion"].startswith(least[1])
    with pytest.raises(ValueError, match="unknown options in args: replicas"):
        read_args({"replicas": 3})


def test_ray_takes_the_configuration():
    schema = pytest.importorskip("ray.serve.schema", reason="needs the extra ray")
    assert schema.ServeDeploySchema(**SERVE).applications[0].name == "qjax"


def metric_names() -> set[str]:
    """Of samples, as PromQL sees them."""
    text = Metrics("m", 4096).render().decode()
    names = dict(re.findall(r"^# TYPE (\S+) (\w+)", text, re.M))
    parts = {
        f"{name}_{part}" for name, kind in names.items() if kind == "histogram" for part in ("bucket", "sum", "count")
    }
    return {name for name, kind in names.items() if kind != "histogram"} | parts


def used(expression: str) -> set[str]:
    return set(re.findall(r"\b(?:vllm|qjax):\w+", expression))


ALERTS = load("alerts.yml")[0]["groups"][0]["rules"]
DASHBOARD = json.loads((FOLDER / "grafana.json").read_text())


def test_alerts_know_the_metrics():
    assert {name for rule in ALERTS for name in used(rule["expr"])} <= metric_names()
    assert all(used(rule["expr"]) or rule["expr"] == 'up{job="qjax"} == 0' for rule in ALERTS)
    assert all(rule["alert"] and rule["labels"]["severity"] and rule["annotations"]["summary"] for rule in ALERTS)
    assert load("prometheus.yml")[0]["rule_files"] == ["alerts.yml"]


def test_the_dashboard_knows_the_metrics():
    expressions = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    variables = [v["query"]["query"] for v in DASHBOARD["templating"]["list"] if v["type"] == "query"]
    assert all(used(e) for e in (*expressions, *variables))
    assert {name for e in (*expressions, *variables) for name in used(e)} <= metric_names()
    gauges = {n for n in metric_names() if not re.search("_(total|created|sum|count|bucket)$", n)}
    assert gauges <= {name for e in expressions for name in used(e)}, "each gauge is shown"


def test_panels_do_not_overlap():
    places = [tuple(panel["gridPos"][axis] for axis in "xy") for panel in DASHBOARD["panels"]]
    assert len(set(places)) == len(places) == len({panel["id"] for panel in DASHBOARD["panels"]})
