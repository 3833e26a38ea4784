"""The files of deploy/ parse, and agree with the flags, routes and metrics of the server."""

from __future__ import annotations

import configparser
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from flowprefill import cli
from flowprefill.server.app import create_app
from flowprefill.server.observe.metric_table import METRICS, PREFIX, MetricSpec
from flowprefill.server.options import ServerOptions

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
BOARD = json.loads((DEPLOY / "grafana/dashboards/flowprefill.json").read_text())
EXPRESSIONS = [target["expr"] for panel in BOARD["panels"] for target in panel["targets"]]
PYTHON = "/opt/flowprefill/bin/python"
SUFFIXES = {"histogram": ("_bucket", "_sum", "_count"), "counter": ("",), "gauge": ("",)}
EXPORTED: dict[str, MetricSpec] = {
    PREFIX + spec.name + suffix: spec for spec in METRICS for suffix in SUFFIXES[spec.kind]
}


def read_yaml(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text())


def read_unit() -> configparser.ConfigParser:
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string((DEPLOY / "flowprefill.service").read_text())
    return unit


def docker_words(instruction: str) -> list[str]:
    """Return the words of the last CMD or ENTRYPOINT of the Dockerfile, in its JSON form."""
    text = (DEPLOY / "Dockerfile").read_text()
    words: list[str] = json.loads(re.findall(rf"^{instruction} (\[.*\])$", text, re.MULTILINE)[-1])
    return words


def commands() -> Iterator[tuple[str, list[str]]]:
    """Yield every command line by which deploy/ starts the server, after `flowprefill`."""
    yield "Dockerfile", docker_words("CMD")
    yield "compose.yaml", read_yaml("compose.yaml")["services"]["flowprefill"]["command"]
    yield "flowprefill.service", shlex.split(read_unit()["Service"]["ExecStart"])[1:]
    deployment, _ = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
    yield "kubernetes.yaml", deployment["spec"]["template"]["spec"]["containers"][0]["args"]


@pytest.mark.parametrize(("file", "words"), list(commands()), ids=[file for file, _ in commands()])
def test_command_starts_a_server_on_the_port_that_the_files_name(
    file: str, words: list[str]
) -> None:
    args = cli.build_parser(words).parse_args(words)
    cli.read_settings(args)
    assert (args.run, args.port) == (cli.run_serve, 8000)
    is_inside = file != "flowprefill.service"  # a container's ports are opened from outside
    assert args.host == ("0.0.0.0" if is_inside else "127.0.0.1")


def metrics_of(expression: str) -> Iterator[tuple[str, set[str]]]:
    """Yield each metric of an expression with the labels that its braces name."""
    for name, braces in re.findall(r"\b((?:\w+:)?\w+){([^}]*)}", expression):
        yield name, set(re.findall(r"(\w+)\s*[=!]~?", re.sub(r'"[^"]*"', '""', braces)))


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_dashboard_asks_for_metrics_and_labels_that_exist(expression: str) -> None:
    metrics = list(metrics_of(expression))
    assert len(metrics) == expression.count("{") > 0
    for name, labels in metrics:
        if name.startswith("process_"):
            continue
        assert name in EXPORTED
        assert labels <= {"model_name", *EXPORTED[name].labels}
        for group in re.findall(r"\bby \(([^)]*)\)", expression):
            known = {"le", "model_name", *EXPORTED[name].labels}
            assert {label.strip() for label in group.split(",")} <= known


def test_dashboard_legends_name_what_is_grouped_by() -> None:
    for panel in BOARD["panels"]:
        for target in panel["targets"]:
            groups = {
                "instance",
                *", ".join(re.findall(r"by \(([^)]*)\)", target["expr"])).split(", "),
            }
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= groups, panel["title"]


def test_dashboard_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + i, at["y"] + j) for i in range(at["w"]) for j in range(at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])


def test_dashboard_names_the_process_metrics_of_the_scraped_job() -> None:
    (scraped,) = read_yaml("prometheus/prometheus.yml")["scrape_configs"]
    jobs = {job for text in EXPRESSIONS for job in re.findall(r'job="([^"]*)"', text)}
    assert jobs == {scraped["job_name"]}


def test_compose_files_exist_and_volumes_are_declared() -> None:
    compose = read_yaml("compose.yaml")
    for service in compose["services"].values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("./"):
                assert (DEPLOY / source).exists(), source
            else:
                assert source in compose["volumes"]
        for port in service["ports"]:
            assert port.startswith("127.0.0.1:")
    build = compose["services"]["flowprefill"]["build"]
    assert (DEPLOY / build["context"] / build["dockerfile"]).is_file()


def test_grafana_finds_dashboards_and_prometheus() -> None:
    compose = read_yaml("compose.yaml")
    mounts = dict(v.split(":")[:2] for v in compose["services"]["grafana"]["volumes"])
    (provider,) = read_yaml("grafana/provisioning/dashboards/flowprefill.yaml")["providers"]
    assert provider["options"]["path"] == mounts["./grafana/dashboards"]
    (source,) = read_yaml("grafana/provisioning/datasources/prometheus.yaml")["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (scraped,) = read_yaml("prometheus/prometheus.yml")["scrape_configs"]
    assert scraped["static_configs"] == [{"targets": ["flowprefill:8000"]}]


def test_kubernetes_probes_are_routes_and_names_agree() -> None:
    deployment, service = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
    pod = deployment["spec"]["template"]
    (server,) = pod["spec"]["containers"]
    routes = {resource.canonical for resource in create_app(None).router.resources()}
    assert server["livenessProbe"]["httpGet"] == {"path": "/health", "port": "http"}
    assert server["readinessProbe"]["httpGet"] == {"path": "/ready", "port": "http"}
    assert {"/health", "/ready", pod["metadata"]["annotations"]["prometheus.io/path"]} <= routes
    labels = pod["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == service["spec"]["selector"] == labels
    (port,) = server["ports"]
    assert (port["name"], service["spec"]["ports"][0]["targetPort"]) == ("http", "http")
    # The number of threads follows from the limit, which is all of the pod's own only if whole.
    assert "--threads" not in server["args"]
    limits = server["resources"]["limits"]
    assert limits["cpu"].isdigit()
    assert limits == server["resources"]["requests"]
    mounted = {mount["name"] for mount in server["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["spec"]["volumes"]}


def test_every_supervisor_waits_longer_than_the_server() -> None:
    grace_s = ServerOptions().shutdown_grace_s
    compose = read_yaml("compose.yaml")["services"]["flowprefill"]
    deployment, _ = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
    pod = deployment["spec"]["template"]["spec"]
    pause_s = float(pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][1])
    assert float(compose["stop_grace_period"].removesuffix("s")) > grace_s
    assert float(read_unit()["Service"]["TimeoutStopSec"]) > grace_s
    assert pod["terminationGracePeriodSeconds"] > grace_s + pause_s


def test_unit_restarts_and_stops_as_the_server_expects() -> None:
    service = read_unit()["Service"]
    assert service["Type"] == "exec"
    assert service["KillSignal"] == "SIGTERM"
    assert service["Restart"] == "on-failure"
    assert service["RestartPreventExitStatus"] == str(cli.USAGE_ERROR)
    assert int(service["LimitNOFILE"]) >= 2 * 16_384  # twice the default cap
    assert "XDG_CACHE_HOME=%C/" + service["CacheDirectory"] in service["Environment"].split()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze")
def test_unit_is_valid_for_systemd(tmp_path: Path) -> None:
    text = (DEPLOY / "flowprefill.service").read_text()
    unit = tmp_path / "flowprefill.service"
    unit.write_text(text.replace("/opt/flowprefill/bin/flowprefill", sys.executable))
    command = ["systemd-analyze", "verify", "--man=no", str(unit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert [line for line in done.stderr.splitlines() if "flowprefill.service" in line] == []


def test_dockerfile_copies_what_exists_and_what_is_sent() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    sent = {
        line[1:]
        for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    copies = re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.MULTILINE)
    copied = {name for line in copies for name in line.split()}
    assert copied == sent
    assert all((ROOT / name).exists() for name in copied)


def test_dockerfile_installs_the_versions_of_the_project() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    install = next(line for line in text.splitlines() if line.startswith("RUN pip install"))
    assert set(shlex.split(install)[3:]) == set(project["build-system"]["requires"])
    embedded = re.search(
        r"^EMBEDDED_MODEL := (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE
    )
    assert embedded is not None
    assert embedded[1] in text.split()


def test_dockerfile_runs_without_root_and_checks_health() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    final = text.rpartition("\nFROM ")[2]
    assert re.search(r"^USER \d+$", final, re.MULTILINE)
    assert docker_words("ENTRYPOINT") == ["/opt/flowprefill/bin/flowprefill"]
    check = json.loads(
        re.search(r"HEALTHCHECK .* CMD (\[.*?\])$", final.replace("\\\n", ""), re.MULTILINE)[1]
    )
    assert check[:2] == [PYTHON, "-c"]
    compile(check[2], "healthcheck", "exec")
    assert "http://127.0.0.1:8000/health" in check[2]
