"""The routes around generation: models, tokens, metrics, debugging, request ids, wrong paths."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from fake_engine import EOS, FakeEngine, Script, Segment, Stats
from prometheus_client.parser import text_string_to_metric_families
from running_server import RunningServer, StartServer

from flowprefill import cli
from flowprefill.config import EngineConfig
from flowprefill.errors import ConfigError, DeadlinePassed, FlowPrefillError, Overloaded
from flowprefill.server.app import create_app
from flowprefill.server.observe.metric_table import METRICS, metrics_markdown
from flowprefill.server.openai.openai_schema import REFUSED
from flowprefill.server.options import ServerOptions
from flowprefill.version import __version__

DOCS = Path(__file__).resolve().parents[2] / "docs"


def samples(server: RunningServer) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Scrape: (name, labels) -> value."""
    reply = server.get("/metrics")
    assert reply.status == 200
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(reply.body.decode())
        for sample in family.samples
    }


def value(server: RunningServer, name: str, **labels: str) -> float:
    """One sample; `class_` stands for the label `class`."""
    wanted = {key.rstrip("_"): label for key, label in labels.items()}
    return samples(server)[name, frozenset({"model_name": "fake-model", **wanted}.items())]


def test_models_list_and_single(server: RunningServer) -> None:
    model = {
        "id": "fake-model",
        "object": "model",
        "created": 1_700_000_000,
        "owned_by": "flowprefill",
        "root": "fake-model",
        "max_model_len": 4_000_000,
    }
    assert server.get("/v1/models").json() == {"object": "list", "data": [model]}
    assert server.get("/v1/models/fake-model").json() == model


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize"])
def test_unknown_model_is_a_404(server: RunningServer, engine: FakeEngine, path: str) -> None:
    body = {
        "model": "gpt-5" * 50,
        **({"messages": [{"role": "user", "content": "a"}]} if "chat" in path else {"prompt": "a"}),
    }
    reply = server.post(path, body)
    assert reply.status == 404
    assert reply.error["code"] == "model_not_found"
    assert reply.error["param"] == "model"
    assert "fake-model" in reply.error["message"]
    assert engine.submitted == []


def test_unknown_path_and_wrong_method_are_json(server: RunningServer) -> None:
    lost = server.get("/v1/nothing")
    assert (lost.status, lost.error["code"]) == (404, "unknown_url")
    wrong = server.get("/v1/completions")
    assert (wrong.status, wrong.error["code"]) == (405, "method_not_allowed")
    assert "POST" in wrong.error["message"]


def test_request_id_is_echoed_or_made(server: RunningServer) -> None:
    body = {"prompt": "a"}
    for path, extra in (("/v1/completions", {}), ("/v1/completions", {"stream": True})):
        reply = server.post(path, {**body, **extra}, {"X-Request-ID": "abc-123"})
        assert reply.headers["x-request-id"] == "abc-123"
    assert server.post("/v1/completions", {}, {"x-request-id": "e"}).headers["x-request-id"] == "e"
    assert server.get("/health").headers["x-request-id"].startswith("req-")
    long = server.get("/health", {"x-request-id": "x" * 201})
    assert long.headers["x-request-id"].startswith("req-")


def test_same_request_id_twice_is_two_requests(server: RunningServer, engine: FakeEngine) -> None:
    ids = [
        server.post("/v1/completions", {"prompt": "a"}, {"x-request-id": "same"}).json()["id"]
        for _ in range(2)
    ]
    assert len(set(ids)) == 2
    assert [handle.request_id for handle in engine.submitted] == ids


def test_version(server: RunningServer) -> None:
    assert server.get("/version").json()["version"] == __version__


def test_tokenize_and_back(server: RunningServer) -> None:
    reply = server.post("/tokenize", {"prompt": "Hi", "return_token_strs": True}).json()
    assert reply == {
        "count": 3,
        "max_model_len": 4_000_000,
        "tokens": [256, 72, 105],
        "token_strs": ["<bos>", "H", "i"],
    }
    bare = server.post("/tokenize", {"prompt": "Hi", "add_special_tokens": False}).json()
    assert bare["tokens"] == [72, 105]
    assert server.post("/detokenize", {"tokens": [72, 105, EOS]}).json() == {"prompt": "Hi"}
    assert server.post("/detokenize", {"tokens": []}).json() == {"prompt": ""}


def test_tokenize_messages_is_what_chat_submits(server: RunningServer, engine: FakeEngine) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}]}
    tokens = server.post("/tokenize", body).json()["tokens"]
    server.post("/v1/chat/completions", body)
    assert len(tokens) == engine.submitted[0].prompt_tokens
    assert server.post("/detokenize", {"tokens": tokens}).json()["prompt"] == "<user>Hi<assistant>"


def test_tokenize_of_a_long_text_is_exact(server: RunningServer) -> None:
    reply = server.post("/tokenize", {"prompt": "x" * 100_000, "add_special_tokens": False})
    assert reply.json()["count"] == 100_000


def test_timeline_is_a_chrome_trace(server: RunningServer, engine: FakeEngine) -> None:
    engine.segments = [
        Segment("prefill long", "layer 0", 1.0, 1.002, 0.0015),
        Segment("prefill short", "layer 0", 1.002, 1.003),
        Segment("prefill long", "layer 1", 1.003, 1.005),
        Segment("decode of 1", "layer 0", 1.005, 1.006),
        Segment("decode of 2", "layer 0", 1.006, 1.007),
    ]
    trace = server.get("/debug/timeline").json()
    events = trace["traceEvents"]
    rows = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    slices = [event for event in events if event["ph"] == "X"]
    assert [rows[event["tid"]] for event in slices] == [
        "prefill long",
        "prefill short",
        "prefill long",
        "decode",
        "decode",
    ]
    assert (trace["otherData"]["origin_s"], slices[0]["ts"]) == (1, 0)
    assert slices[1]["ts"] == slices[0]["dur"]
    assert slices[0]["dur"] == pytest.approx(2000)
    assert slices[0]["args"] == {"run": "prefill long", "predicted_ms": 1.5}


DEBUG_PATHS = (
    "/debug/decisions",
    "/debug/timeline",
    "/debug/requests",
    "/debug/requests/a",
    "/live",
)


@pytest.mark.parametrize(
    ("host", "wanted", "is_on"),
    [
        ("127.0.0.1", "auto", True),
        ("127.0.0.1", "off", False),
        ("0.0.0.0", "auto", False),
        ("0.0.0.0", "on", True),
    ],
)
def test_debug_routes_are_for_this_machine_unless_it_is_said(
    engine: FakeEngine, start_server: StartServer, host: str, wanted: str, is_on: bool
) -> None:
    server = start_server(engine, host, debug_routes=wanted)
    codes = {}
    for path in DEBUG_PATHS:
        reply = server.get(path)
        codes[path] = "" if reply.status == 200 else reply.error["code"]
        if not is_on:
            assert "--debug-routes on" in reply.error["message"]
    of_one = "request_not_found"
    shown = dict.fromkeys(DEBUG_PATHS, "") | {"/debug/requests/a": of_one}
    assert codes == (shown if is_on else dict.fromkeys(DEBUG_PATHS, "debug_routes_off"))
    for path in ("/health", "/ready", "/metrics", "/"):
        assert server.get(path).status == 200
    if is_on:
        assert server.get("/debug/decisions").json() == {"decisions": engine.decisions()}


def test_debug_routes_want_a_key_where_tenants_have_them(
    engine: FakeEngine, start_server: StartServer
) -> None:
    server = start_server(engine, tenants={"a": {"key": "secret"}})
    for path in DEBUG_PATHS:
        assert server.get(path).status == 401, path
        assert server.get(path, {"Authorization": "Bearer secret"}).status != 401, path
    for path in ("/health", "/ready", "/metrics", "/v1/models"):
        assert server.get(path).status == 200, path


def test_explain_sends_a_key(
    engine: FakeEngine,
    start_server: StartServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server = start_server(engine, tenants={"a": {"key": "secret"}})
    command = ["explain", "--json", "--url", server.url]
    assert cli.main(command) == 2
    assert "authorization: missing" in capsys.readouterr().err
    assert cli.main([*command, "--api-key", "secret"]) == 0
    monkeypatch.setenv("FLOWPREFILL_API_KEY", "secret")
    assert cli.main(command) == 0


def test_metrics_of_ended_requests(start_server: StartServer) -> None:
    engine = FakeEngine(EngineConfig(classes={"chat": {"ttft_ms": 250, "tpot_ms": 0.5}}))
    server = start_server(engine)
    server.post("/v1/completions", {"prompt": "Hi", "slo": {"class": "chat"}})
    server.post("/v1/completions", {"prompt": "Hi", "max_tokens": 4})
    prefix = "flowprefill:"
    assert value(server, prefix + "requests_total", class_="chat", finished_reason="stop") == 1
    assert value(server, prefix + "requests_total", class_="default", finished_reason="length") == 1
    assert value(server, prefix + "prompt_tokens_total", class_="chat") == 3
    assert value(server, prefix + "generation_tokens_total", class_="default") == 4
    met = prefix + "slo_requests_total"
    assert value(server, met, class_="chat", slo="ttft", met="true") == 1
    assert value(server, met, class_="chat", slo="tpot", met="false") == 1
    ttft = prefix + "time_to_first_token_seconds"
    assert value(server, ttft + "_sum", class_="chat") == pytest.approx(0.008)
    for part, seconds in (("queue", 0.001), ("preprocess", 0.00025), ("waiting", 0.00075)):
        name = f"{prefix}request_{part}_time_seconds_sum"
        assert value(server, name, class_="chat") == pytest.approx(seconds)
    assert value(server, ttft + "_bucket", class_="chat", le="0.01") == 1
    assert value(server, ttft + "_bucket", class_="chat", le="0.005") == 0
    itl = prefix + "inter_token_latency_seconds_count"
    assert value(server, itl, class_="chat") == 11
    error = prefix + "ttft_prediction_error_seconds_sum"
    assert value(server, error, direction="late") == pytest.approx(2 * 0.003)


def test_metrics_of_the_process(server: RunningServer) -> None:
    found = {name: number for (name, labels), number in samples(server).items() if not labels}
    assert found["process_resident_memory_bytes"] > 1e6
    assert 0 < found["process_open_fds"] <= found["process_max_fds"]
    assert found["process_cpu_seconds_total"] > 0


def test_goodput_counts_what_met_its_objectives(server: RunningServer) -> None:
    server.post("/v1/completions", {"prompt": "Hi", "slo": {"ttft_ms": 9}})
    server.post("/v1/completions", {"prompt": "Hi", "slo": {"ttft_ms": 7}})
    server.post("/v1/completions", {"prompt": "Hi"})
    assert value(server, "flowprefill:goodput_requests_total", class_="default") == 1
    slo = "flowprefill:slo_requests_total"
    assert value(server, slo, class_="default", slo="ttft", met="true") == 1
    assert value(server, slo, class_="default", slo="ttft", met="false") == 1


def test_metrics_of_the_mechanism(server: RunningServer, engine: FakeEngine) -> None:
    engine.current_stats = Stats(2, 3, 1, 25, 100, 640, 64, 7, 4096, 12, 0.0021, 4)
    engine.preempt("deadline", 0.0009)
    assert value(server, "flowprefill:preemptions_total", reason="deadline") == 1
    assert value(server, "flowprefill:preempt_ack_seconds_bucket", le="0.001") == 1
    assert value(server, "flowprefill:scheduler_decision_seconds_count") == 1
    assert value(server, "flowprefill:num_requests_running") == 2
    assert value(server, "flowprefill:num_requests_waiting") == 3
    assert value(server, "flowprefill:num_requests_suspended") == 1
    assert value(server, "flowprefill:num_requests_held") == 4
    assert value(server, "flowprefill:kv_cache_usage_perc") == 0.25
    assert value(server, "flowprefill:prefix_cache_queries_total") == 640
    assert value(server, "flowprefill:prefix_cache_hits_total") == 64
    assert value(server, "flowprefill:kv_blocks_cached") == 7
    assert value(server, "flowprefill:workspace_bytes") == 4096
    assert value(server, "flowprefill:segments_total") == 12
    assert value(server, "flowprefill:max_blocking_seconds") == 0.0021


def test_shed_reason_equals_the_code_in_the_reply(
    server: RunningServer, engine: FakeEngine
) -> None:
    engine.submit_error = Overloaded("full", retry_after_s=1)
    code = server.post("/v1/completions", {"prompt": "a"}).error["code"]
    assert value(server, "flowprefill:requests_shed_total", reason=code) == 1
    engine.submit_error = None
    engine.script = Script(error=DeadlinePassed("late"), error_at=2)
    server.post("/v1/completions", {"prompt": "a", "stream": True})
    assert value(server, "flowprefill:requests_shed_total", reason="deadline_passed") == 1


def test_vllm_names_are_behind_their_option(start_server: StartServer, engine: FakeEngine) -> None:
    plain, both = start_server(engine), start_server(engine, vllm_metrics=True)
    both.post("/v1/completions", {"prompt": "Hi"})
    engine.script = Script(error=RuntimeError("bug"))
    both.post("/v1/completions", {"prompt": "Hi"})
    assert not any(name.startswith("vllm:") for name, _ in samples(plain))
    names = {name for name, _ in samples(both)}
    for name in (
        "vllm:time_to_first_token_seconds_bucket",
        "vllm:inter_token_latency_seconds_count",
        "vllm:e2e_request_latency_seconds_sum",
        "vllm:request_queue_time_seconds_sum",  # in its scheduler's queue, as vLLM counts it
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:prefix_cache_hits_total",
        "vllm:prompt_tokens_total",
        "vllm:generation_tokens_total",
        "vllm:request_success_total",
    ):
        assert name in names
    reasons = {
        dict(labels)["finished_reason"]
        for name, labels in samples(both)
        if name == "vllm:request_success_total"
    }
    assert reasons == {"stop"}, "failed requests are no success"


def test_every_metric_of_the_table_is_exported_with_its_help(
    start_server: StartServer, engine: FakeEngine
) -> None:
    text = start_server(engine).get("/metrics").body.decode()
    for spec in METRICS:
        assert f"# HELP flowprefill:{spec.name} {spec.doc}" in text
        assert f"# TYPE flowprefill:{spec.name} {spec.kind}" in text
        assert not spec.name.endswith("_ms"), "seconds only"
        assert (spec.kind == "counter") == spec.name.endswith("_total")


def test_api_document_names_every_refused_field_and_every_code() -> None:
    text = (DOCS / "api.md").read_text()
    errors = [FlowPrefillError]
    for error in errors:
        errors.extend(error.__subclasses__())
    shown = {error.code for error in errors} - {"bad_config", "bad_checkpoint"}
    assert [code for code in sorted(shown) if f"`{code}`" not in text] == []
    assert [name for name in REFUSED if f"`{name}" not in text] == []
    for path in re.findall(r"`(?:GET|POST) (/[^`]*)`", text):
        assert path in paths_of(create_app(None))


def paths_of(app: web.Application) -> set[str]:
    """Every path of the application; what is variable is in braces."""
    return {resource.canonical for resource in app.router.resources()}


def test_metrics_document_has_the_table_of_the_code() -> None:
    assert metrics_markdown() in (DOCS / "metrics.md").read_text()


@pytest.mark.parametrize(
    ("values", "param"),
    [
        ({"max_body_mib": -1}, "max_body_mib"),
        ({"max_choices": 1.5}, "max_choices"),
        ({"keep_alive_s": "often"}, "keep_alive_s"),
        ({"shutdown_grace_s": -1}, "shutdown_grace_s"),
        ({"vllm_metrics": 1}, "vllm_metrics"),
        ({"served_model_names": "one"}, "served_model_names"),
        ({"served_model_names": [""]}, "served_model_names"),
        ({"service_tiers": {"flex": 1}}, "service_tiers"),
        ({"service_tiers": []}, "service_tiers"),
        ({"debug_routes": True}, "debug_routes"),
        ({"colour": "blue"}, "colour"),
    ],
)
def test_bad_option_is_refused(values: dict[str, Any], param: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ServerOptions.from_mapping(values)
    assert caught.value.param == param
    assert "expected" in caught.value.message


def test_service_tier_to_a_class_that_is_not_configured_is_refused() -> None:
    with pytest.raises(ConfigError, match="batch"):
        ServerOptions(service_tiers={"flex": "batch"}).check_classes(EngineConfig())


def test_story_of_a_request_and_of_a_reply_with_several_choices(
    server: RunningServer, engine: FakeEngine
) -> None:
    reply = server.post("/v1/completions", {"prompt": "Hi"}).json()
    assert server.get(f"/debug/requests/{reply['id']}").json()["id"] == reply["id"]
    both = server.post("/v1/completions", {"prompt": "Hi", "n": 2}).json()
    unknown = server.get(f"/debug/requests/{both['id']}")
    assert (unknown.status, unknown.error["code"]) == (404, "request_not_found")
    assert f"its choices are {both['id']}-0, {both['id']}-1" in unknown.error["message"]
    listed = server.get("/debug/requests").json()["requests"]
    assert [one["id"] for one in listed] == [f"{both['id']}-1", f"{both['id']}-0", reply["id"]]
    assert server.get("/debug/requests/a%2Fb%00").status == 404


def test_load_counts_what_is_being_done(server: RunningServer, engine: FakeEngine) -> None:
    assert server.get("/load").json() == {
        "server_load": 0, "running": 0, "waiting": 0, "suspended": 0,
    }  # fmt: skip


def test_server_info_names_model_and_settings(server: RunningServer) -> None:
    info = server.get("/server_info").json()
    assert (info["model"], info["device"]) == ("fake-model", "cpu")
    assert info["engine_settings"]["policy"] == "slack_edf"
    assert info["server_settings"]["tool_call_parser"] == "auto"
    assert "tenants" not in info["server_settings"]
