"""Whether telemetry is wanted, by the setting `otlp_endpoint` or the OTEL_ variables; at the start.

OpenTelemetry is an optional dependency, imported by otel.py alone.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

from flowprefill.errors import ConfigError
from flowprefill.server.observe.telemetry import Telemetry
from flowprefill.server.options import ServerOptions

logger = logging.getLogger(__name__)

EXTRA = "opentelemetry is not installed: pip install 'flowprefill[otel]'"


def open_telemetry(
    options: ServerOptions, environment: Mapping[str, str] = os.environ
) -> Telemetry | None:
    """Return the telemetry that the settings or the environment ask for; None: neither does.

    Raises:
        ConfigError: the setting asks for it, and OpenTelemetry is not installed or refuses a
            variable of its own.
    """
    traces, metrics = wanted_signals(options.otlp_endpoint, environment)
    if not traces and not metrics:
        return None
    try:
        from flowprefill.server.observe import otel
    except ImportError as error:
        if options.otlp_endpoint:
            message = f"otlp_endpoint: {EXTRA} ({error})"
            raise ConfigError(message, param="otlp_endpoint") from None
        # The variables may be meant for others: a server that runs is worth more than its traces.
        logger.warning("OTEL_* variables ask for telemetry, but %s (%s)", EXTRA, error)
        return None
    try:
        sink = otel.otlp_sink(options.otlp_endpoint, traces=traces, metrics=metrics)
    except ValueError as error:
        message = f"OpenTelemetry refuses its OTEL_* variables: {' '.join(str(error).split())}"
        if options.otlp_endpoint:
            raise ConfigError(f"otlp_endpoint: {message}", param="otlp_endpoint") from None
        logger.warning("no telemetry: %s", message)
        return None
    return Telemetry(sink)


def wanted_signals(endpoint: str, environment: Mapping[str, str]) -> tuple[bool, bool]:
    """Return whether traces, and whether metrics, are to be exported.

    By OpenTelemetry's rules: ``OTEL_SDK_DISABLED`` switches all off, ``OTEL_TRACES_EXPORTER`` and
    ``OTEL_METRICS_EXPORTER`` are ``none`` or ``otlp``, an endpoint switches on what is not off.
    """
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False, False

    def is_wanted(signal: str) -> bool:
        exporters = environment.get(f"OTEL_{signal}_EXPORTER", "").strip().lower()
        if exporters:
            return "otlp" in exporters.split(",")
        names = ("OTEL_EXPORTER_OTLP_ENDPOINT", f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT")
        return bool(endpoint) or any(environment.get(name, "").strip() for name in names)

    return is_wanted("TRACES"), is_wanted("METRICS")
