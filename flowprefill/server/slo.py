"""From an HTTP request to its SLO: field over header over class over default."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flowprefill.config import EngineConfig
from flowprefill.errors import InvalidRequest, exact
from flowprefill.request import SLO
from flowprefill.server.http.body import Body
from flowprefill.server.tenants import ONLY_TENANT, Tenant

MAX_OBJECTIVE_MS = 86_400_000.0
SLO_FIELDS = ("ttft_ms", "tpot_ms", "on_miss", "class")
OPENAI_TIERS = ("auto", "default", "fast", "flex", "priority", "scale")
# Ours first: where both families are sent, ours wins.
HEADER_PREFIXES = ("x-slo-", "x-llm-d-slo-")
CLASS_HEADER = "x-slo-class"


@dataclass(frozen=True, slots=True)
class ClientRules:
    """What the operator lets one client state.

    Attributes:
        may_state_objectives: else its class alone does.
        may_state_priority: else its priority must be 0.
        min_ttft_ms: smallest objective it may state.
        tenant: who it is, and which classes it may use.
        client: for fair shares of decode steps: the tenant's name, or where there are none the
            address.
    """

    may_state_objectives: bool = True
    may_state_priority: bool = True
    min_ttft_ms: float = 0.0
    tenant: Tenant = ONLY_TENANT
    client: str = ""

    def check_priority(self, priority: int) -> int:
        """Return the priority; raises InvalidRequest if it may not be stated."""
        if priority and not self.may_state_priority:
            allowed = "null or 0: this server lets no client state a priority"
            raise InvalidRequest.field("priority", priority, allowed)
        return priority

    def check_objective(self, name: str, where: str, value: Any) -> None:
        """Refuse an objective that may not be stated; value: as the client wrote it."""
        if not self.may_state_objectives:
            raise InvalidRequest.field(where, value, "null: here the service class states it")
        if name == "ttft" and float(value) < self.min_ttft_ms:
            allowed = f"at least {exact(self.min_ttft_ms)} (the smallest this server takes)"
            raise InvalidRequest.field(where, value, allowed)


NO_RULES = ClientRules()


def _header_objective(headers: Mapping[str, str], name: str, rules: ClientRules) -> float | None:
    """Read ``x-slo-<name>-ms`` or ``x-llm-d-slo-<name>-ms``; seconds."""
    for prefix in HEADER_PREFIXES:
        header = f"{prefix}{name}-ms"
        text = headers.get(header)
        if text is None:
            continue
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 < value <= MAX_OBJECTIVE_MS:
            raise InvalidRequest.field(header, text, "milliseconds in (0, 86400000]")
        rules.check_objective(name, header, text)
        return value / 1e3
    return None


def _class_of_tier(tier: str | None, tiers: Mapping[str, str]) -> str | None:
    if tier is None:
        return None
    if tier in tiers:
        return tiers[tier]
    if tier not in OPENAI_TIERS:
        allowed = ", ".join(sorted({*OPENAI_TIERS, *tiers}))
        raise InvalidRequest.field("service_tier", tier, f"one of: {allowed}")
    return None


def _named_class(
    body: Body, field: Body | None, headers: Mapping[str, str], tiers: Mapping[str, str]
) -> tuple[str, str] | None:
    """Return (service class, where it was named) by precedence, or None."""
    tier = body.text("service_tier")
    tier_class = _class_of_tier(tier, tiers)
    name = field.text("class") if field is not None else None
    if name is not None:
        return name, "slo.class"
    if CLASS_HEADER in headers:
        return headers[CLASS_HEADER], CLASS_HEADER
    return (tier_class, "service_tier") if tier_class is not None else None


def _starting_slo(
    named: tuple[str, str] | None, config: EngineConfig, allowed: Sequence[str]
) -> SLO:
    """Return what the service class states; `allowed` are those the client may use, () is all."""
    if allowed:
        named = named or (allowed[0], "")
        if named[0] not in allowed:
            of_key = ", ".join(allowed)
            raise InvalidRequest.field(named[1], named[0], f"a class of this key: {of_key}")
    if named is None or (named[0] == "default" and "default" not in config.classes):
        return config.default_slo()
    if named[0] in config.classes:
        return config.slo_of_class(named[0])
    known = ", ".join(sorted({*config.classes, "default"}))
    raise InvalidRequest.field(named[1], named[0], f"a configured service class: {known}")


def slo_of(
    body: Body,
    headers: Mapping[str, str],
    config: EngineConfig,
    tiers: Mapping[str, str],
    rules: ClientRules = NO_RULES,
) -> SLO:
    """Work out the SLO of one HTTP request.

    The service class (field ``slo.class``, header ``x-slo-class``, mapped ``service_tier``, or the
    default) gives the starting values; each value given by header replaces its own, and each value
    given in the field ``slo`` replaces both.

    Args:
        body: the request's body; reads ``slo`` and ``service_tier``.
        headers: case-insensitive.
        config: service classes and default objectives.
        tiers: OpenAI service tier -> service class.
        rules: what this client may state.

    Raises:
        InvalidRequest: a bad value, an unknown class, or what the client may not state; names the
            field or header.
    """
    field = body.object("slo")
    named = _named_class(body, field, headers, tiers)
    slo = _starting_slo(named, config, rules.tenant.classes)
    changes: dict[str, float | str] = {}
    for name in ("ttft", "tpot"):
        header_s = _header_objective(headers, name, rules)
        if header_s is not None:
            changes[name] = header_s
        field_ms = _field_objective(field, name)
        if field_ms is not None:
            rules.check_objective(name, f"slo.{name}_ms", field_ms)
            changes[name] = field_ms / 1e3
    if field is not None:
        on_miss = field.text("on_miss")
        if on_miss is not None:
            rules.check_objective("on_miss", "slo.on_miss", on_miss)
            changes["on_miss"] = on_miss
        field.refuse_unknown(SLO_FIELDS)
    return dataclasses.replace(slo, **changes)  # type: ignore[arg-type]


def _field_objective(field: Body | None, name: str) -> float | None:
    if field is None:
        return None
    value: float | None = field.number(f"{name}_ms", None, 0.0, MAX_OBJECTIVE_MS, open_low=True)
    return value
