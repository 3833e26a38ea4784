"""ServerOptions: every setting of the HTTP server; the CLI's flags come from it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from flowprefill.config import EngineConfig
from flowprefill.errors import ConfigError, shortened, within
from flowprefill.models.json_file import is_text
from flowprefill.server.openai.reasoning import REASONING_PARSERS
from flowprefill.server.openai.tool_parsers import TOOL_PARSERS
from flowprefill.server.tenants import Tenants

MAX_CONNECTIONS = 1 << 20
SECRET = ("tenants", "api_key", "otlp_endpoint")  # settings that hold keys
_FLAGS = (
    "vllm_metrics", "log_requests", "page", "client_slo", "client_priority"
)  # fmt: skip
_HOST = re.compile(r"[\w.-]+|\[?[0-9a-f:.]+\]?|\*", re.IGNORECASE)
_URL = re.compile(r"https?://[^/\s]+(/\S*)?")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s]+|null")


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value


def _option(default: Any, doc: str) -> Any:
    return field(default=default, metadata={"doc": doc})


def _text_map(doc: str) -> Any:
    return field(default_factory=dict, metadata={"doc": doc})


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """Settings of one server; each field's ``metadata['doc']`` is its help text."""

    served_model_names: tuple[str, ...] = _option(
        (), "names the model answers to, first one reported; empty is the engine's own"
    )
    max_body_mib: float = _option(
        0.0, "largest request body, MiB (413 above); 0 is 4, or 32 bytes a token of max_model_len"
    )
    max_bodies_mib: float = _option(
        512.0,
        "most memory for the bodies of all requests that are being read or tokenised, MiB (503 "
        "above)",
    )
    body_timeout_s: float = _option(60.0, "seconds in which a request body must come (408 after)")
    max_connections: int = _option(
        0, "most connections; 0 is 16384, or what the limit of open files leaves room for"
    )
    header_timeout_s: float = _option(20.0, "seconds in which a connection must send a request")
    idle_timeout_s: float = _option(75.0, "seconds for which a connection may be idle")
    write_timeout_s: float = _option(30.0, "seconds for which a client may read nothing")
    max_choices: int = _option(1024, "most choices (prompts times n) of one request")
    keep_alive_s: float = _option(10.0, "seconds between keep-alive comments in a silent stream")
    shutdown_grace_s: float = _option(30.0, "seconds running requests may go on after SIGTERM")
    service_tiers: Mapping[str, str] = _text_map(
        'OpenAI service_tier -> service class, as JSON, e.g. {"flex": "batch"}'
    )
    tenants: Mapping[str, Any] = _text_map(
        "who may ask, as JSON: name -> {key, classes}; keys come as Authorization: Bearer; empty "
        "lets every client ask"
    )
    api_key: str = _option(
        "",
        "key that clients must send as Authorization: Bearer, if they are no tenants; empty "
        "lets every client ask",
    )
    client_slo: bool = _option(True, "clients may state objectives; classes do if they may not")
    client_priority: bool = _option(True, "clients may state a priority")
    min_ttft_ms: float = _option(0.0, "smallest ttft_ms that a client may state; 0 is any")
    max_request_s: float = _option(
        3600.0,
        "longest predicted work of one request with several choices, seconds (400 above); 0 is "
        "no limit. Counts only where the machine is calibrated",
    )
    tool_call_parser: str = _option(
        "auto", f"how the model writes tool calls: {', '.join(TOOL_PARSERS)} (by the chat template)"
    )
    reasoning_parser: str = _option(
        "auto", f"how the model marks its reasoning: {', '.join(REASONING_PARSERS)}"
    )
    max_stored_responses: int = _option(
        1000, "replies of /v1/responses kept for previous_response_id; 0 is none"
    )
    vllm_metrics: bool = _option(False, "export the common metrics under vllm: names as well")
    log_requests: bool = _option(
        False, "log one line for each request: id, route, status, tokens, times, objectives met"
    )
    debug_routes: str = _option(
        "auto",
        "on, off or auto: serve /debug/... and /live, which show ids, lengths and times of all "
        "requests; auto is on where the server listens on a loopback address only",
    )
    page: bool = _option(True, "serve the page at / and what it shows, /live")
    allowed_origins: tuple[str, ...] = _option(
        (), "origins whose browser pages may call the server, or '*' for all; empty is none"
    )
    allowed_hosts: tuple[str, ...] = _option(
        (),
        "names by which clients may call the server besides localhost and loopback addresses, or "
        "'*' for any; empty is none on a loopback address, any elsewhere",
    )
    otlp_endpoint: str = _option(
        "",
        "URL of an OpenTelemetry collector (OTLP over HTTP) for traces and metrics, e.g. "
        "http://localhost:4318; empty: the OTEL_* variables decide",
    )
    ssl_certfile: str = _option("", "PEM file of the server's certificate chain; empty is no TLS")
    ssl_keyfile: str = _option("", "PEM file of its private key; empty: it is in ssl_certfile")
    ssl_ca_certs: str = _option(
        "", "PEM file of authorities, one of which must have signed a client's certificate"
    )
    unknown_fields: str = _option(
        "refuse",
        "refuse: a request with a field that the API does not have is a 400, as it might have "
        "changed the answer; ignore: such fields are logged once each and have no effect",
    )
    generation_config: str = _option(
        "auto",
        "auto: sampling fields that a request does not name are those of the model's "
        "generation_config.json; none: they are OpenAI's",
    )

    def __post_init__(self) -> None:
        ranges: dict[str, tuple[float, float]] = {
            "max_body_mib": (0, 4096), "max_bodies_mib": (1, 1_048_576),
            "body_timeout_s": (0.01, 86_400),
            "max_connections": (0, MAX_CONNECTIONS), "header_timeout_s": (0.01, 86_400),
            "idle_timeout_s": (0.01, 86_400), "write_timeout_s": (0.01, 86_400),
            "max_choices": (1, 100_000), "min_ttft_ms": (0, 86_400_000),
            "max_request_s": (0, 31_536_000), "max_stored_responses": (0, 1_000_000),
            "keep_alive_s": (0.01, 3600), "shutdown_grace_s": (0, 86_400),
        }  # fmt: skip
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            whole = name in ("max_choices", "max_connections", "max_stored_responses")
            kinds = (int,) if whole else (int, float)
            if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
                kind = "an integer" if whole else "a number"
                self._refuse(name, value, f"{kind} {within(low, high)}")
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                self._refuse(name, getattr(self, name), "true or false")
        parsers = {"tool_call_parser": TOOL_PARSERS, "reasoning_parser": REASONING_PARSERS}
        for name, known in parsers.items():
            if getattr(self, name) not in known:
                self._refuse(name, getattr(self, name), "one of " + ", ".join(known))
        self._check_texts()
        tiers = self.service_tiers
        if not isinstance(tiers, Mapping) or not all(isinstance(v, str) for v in tiers.values()):
            self._refuse("service_tiers", tiers, "an object of tier: class")
        tenants: object = self.tenants
        if not isinstance(tenants, Mapping):
            self._refuse("tenants", type(tenants).__name__, "an object of name: tenant")
        key: object = self.api_key
        if not isinstance(key, str) or key != key.strip():
            self._refuse("api_key", "..." if key else key, "a text without blanks around it")
        Tenants(self.tenants, self.api_key)

    def _check_texts(self) -> None:
        for name, allowed in (
            ("served_model_names", "a list of names in UTF-8"),
            ("allowed_origins", "a list of origins such as 'http://localhost:3000', or '*'"),
            ("allowed_hosts", "a list of host names or addresses, or '*'"),
        ):
            texts: object = getattr(self, name)
            if not isinstance(texts, tuple) or not all(t and is_text(t) for t in texts):
                self._refuse(name, texts, allowed)
        for origin in self.allowed_origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                self._refuse("allowed_origins", origin, "an origin, SCHEME://HOST[:PORT], or '*'")
        url: object = self.otlp_endpoint
        if not isinstance(url, str) or (url and not _URL.fullmatch(url)):
            self._refuse("otlp_endpoint", url, "http://HOST[:PORT][/PATH], https too, or ''")
        for name in ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs"):
            path: object = getattr(self, name)
            if not isinstance(path, str) or "\0" in path:
                self._refuse(name, path, "the path of a PEM file, or an empty text")
        for host in self.allowed_hosts:
            if not _HOST.fullmatch(host):
                self._refuse("allowed_hosts", host, "a host's name or address, no port, or '*'")
        for name, known in (
            ("generation_config", ("auto", "none")),
            ("debug_routes", ("auto", "on", "off")),
            ("unknown_fields", ("refuse", "ignore")),
        ):
            if getattr(self, name) not in known:
                self._refuse(name, getattr(self, name), "one of " + ", ".join(known))

    @staticmethod
    def _refuse(name: str, value: Any, allowed: str) -> None:
        raise ConfigError(f"{name}: got {shortened(value)}, expected {allowed}", param=name)

    def shown(self) -> dict[str, Any]:
        """Return the settings that every client may see, without those that hold keys."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self) if f.name not in SECRET}

    def check_classes(self, config: EngineConfig) -> None:
        """Refuse tiers and tenants that name a class the engine does not know."""
        named = [(f"service_tiers.{tier}", name) for tier, name in self.service_tiers.items()]
        for tenant, spec in self.tenants.items():
            named += [(f"tenants.{tenant}.classes", name) for name in spec.get("classes", ())]
        for where, name in named:
            if name != "default" and name not in config.classes:
                known = ", ".join(sorted({*config.classes, "default"}))
                self._refuse(where, name, f"a configured class: {known}")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> ServerOptions:
        """Build from a dictionary, e.g. the ``server`` part of a config file."""
        known = {f.name for f in fields(cls)}
        for key in values:
            if key not in known:
                allowed = "one of " + ", ".join(sorted(known))
                raise ConfigError(f"setting: got {key!r}, expected {allowed}", param=key)
        checked = dict(values)
        for name in ("served_model_names", "allowed_origins", "allowed_hosts"):
            if isinstance(checked.get(name), list):
                checked[name] = tuple(checked[name])
        return cls(**checked)
