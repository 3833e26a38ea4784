"""Objectives of service classes: maps from objectives.json or a user's file, put on traces. Pure.

A map gives each class its TTFT and TPOT objective, for one model on one machine. For another
machine lengths or objectives are scaled: `for_machine` keeps the ratio of objective to the time
that a long prompt of the class needs alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flowprefill.errors import ConfigError
from flowprefill.traces.trace import Trace, TraceRequest
from flowprefill.traces.transforms import scaled_objectives

BUILT_IN = Path(__file__).with_name("objectives.json")
UNBOUNDED = math.inf


@dataclass(frozen=True, slots=True)
class ClassObjective:
    """Objectives of one class.

    Attributes:
        ttft_s: time to first token, seconds.
        tpot_s: time per output token after the first, seconds; inf is none.
        up_to_tokens: prompts of traces without classes belong to the first class that is at least
            so long; inf: this class takes none by length.
        p99_tokens: length of a long prompt of the class, for `for_machine`; 0 is unknown.
    """

    ttft_s: float
    tpot_s: float = UNBOUNDED
    up_to_tokens: float = UNBOUNDED
    p99_tokens: int = 0


@dataclass(frozen=True, slots=True)
class ObjectiveMap:
    """Objectives by class.

    Attributes:
        name: for reports.
        source: where the figures come from.
        classes: class -> objectives, shortest prompts first where classes go by length.
        solo_s_per_token: time that a prompt needs alone on the map's machine, per token; 0 is
            unknown.
    """

    name: str
    source: str
    classes: Mapping[str, ClassObjective]
    solo_s_per_token: float = 0.0

    @property
    def is_by_length(self) -> bool:
        """Whether a request's class follows from its prompt length."""
        return any(one.up_to_tokens < UNBOUNDED for one in self.classes.values())

    def class_of(self, request: TraceRequest) -> str:
        """Return a request's class.

        Raises:
            ConfigError: the map has no such class, or none for prompts so long.
        """
        if not self.is_by_length:
            name = request.service_class
            if name in self.classes:
                return name
            known = ", ".join(self.classes)
            message = f"objectives {self.name}: class {name!r}, expected one of {known}"
            raise ConfigError(message, param="objectives")
        for name, one in self.classes.items():
            if request.prompt_tokens <= one.up_to_tokens < UNBOUNDED:
                return name
        message = f"objectives {self.name}: no class for a prompt of {request.prompt_tokens} tokens"
        raise ConfigError(message, param="objectives")


def built_in_maps() -> tuple[str, ...]:
    """Return the names of the maps that come with the package."""
    return tuple(json.loads(BUILT_IN.read_text(encoding="utf-8")))


def load_objectives(name: str | Path) -> ObjectiveMap:
    """Return a map by its name, or the one map of a JSON file of the same form.

    Raises:
        ConfigError: neither a known name nor a well-formed file.
    """
    built_in = json.loads(BUILT_IN.read_text(encoding="utf-8"))
    if name in built_in:
        return _map_of(str(name), built_in[name])
    path = Path(name)
    if not path.is_file():
        known = ", ".join(built_in)
        message = f"objectives: got {str(name)!r}, expected one of {known}, or a JSON file"
        raise ConfigError(message, param="objectives")
    try:
        maps = json.loads(path.read_text(encoding="utf-8"))
        ((own_name, spec),) = maps.items()
    except (ValueError, AttributeError, RecursionError):
        message = f"objectives: {path}: expected a JSON object with one map, {{NAME: {{classes}}}}"
        raise ConfigError(message, param="objectives") from None
    return _map_of(own_name, spec)


def objectives_for(trace: Trace) -> ObjectiveMap:
    """Return the built-in map for an 8B model: by class if the trace has those, else by length."""
    by_class = load_objectives("qwen-8b")
    has_classes = all(one.service_class in by_class.classes for one in trace.requests)
    return by_class if has_classes else load_objectives("length-8b")


def _map_of(name: str, spec: Any) -> ObjectiveMap:
    try:
        classes = {key: ClassObjective(**value) for key, value in spec["classes"].items()}
        source, per_token_s = str(spec.get("source", "")), float(spec.get("solo_s_per_token", 0))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        message = f"objectives {name}: {error}, expected classes: {{CLASS: {{ttft_s, tpot_s}}}}"
        raise ConfigError(message, param="objectives") from None
    for key, one in classes.items():
        for field in ("ttft_s", "tpot_s", "up_to_tokens"):
            value = getattr(one, field)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                message = f"objectives {name}.{key}.{field}: got {value!r}, expected a number > 0"
                raise ConfigError(message, param="objectives")
    return ObjectiveMap(name, source, classes, per_token_s)


def with_objectives(trace: Trace, objectives: ObjectiveMap, scale: float = 1.0) -> Trace:
    """Give every request the objectives of its class, multiplied by a scale.

    Raises:
        ConfigError: a request has no class in the map, or the scale is not > 0.
    """
    if not 0 < scale < UNBOUNDED:
        raise ConfigError(f"slo_scale: got {scale}, expected a number > 0", param="slo_scale")
    requests = []
    for request in trace.requests:
        name = objectives.class_of(request)
        one = objectives.classes[name]
        requests.append(
            replace(
                request,
                service_class=name,
                ttft_s=one.ttft_s,
                tpot_s=one.tpot_s,
            )
        )
    return scaled_objectives(Trace(trace.name, tuple(requests)), scale)


def for_machine(
    objectives: ObjectiveMap, solo_s: Callable[[int], float], length_scale: float = 1.0
) -> ObjectiveMap:
    """Carry TTFT objectives to another machine by the ratio of solo prefill times.

    Each class's objective is multiplied by the time its long prompt (``p99_tokens``, scaled as the
    trace's lengths are) needs alone there, over the time it needs alone on the map's machine.

    Args:
        solo_s: prompt tokens -> seconds of an undisturbed prefill on the other machine.
        length_scale: of the trace's lengths there.

    Raises:
        ConfigError: the map does not say how fast its own machine is.
    """
    if objectives.solo_s_per_token <= 0 or any(
        one.p99_tokens < 1 for one in objectives.classes.values()
    ):
        message = (
            f"objectives {objectives.name}: no solo_s_per_token or p99_tokens, expected both to "
            "carry them to another machine"
        )
        raise ConfigError(message, param="objectives")
    classes = {}
    for name, one in objectives.classes.items():
        there_s = solo_s(max(1, round(one.p99_tokens * length_scale)))
        ratio = there_s / (one.p99_tokens * objectives.solo_s_per_token)
        classes[name] = replace(one, ttft_s=one.ttft_s * ratio)
    return replace(objectives, name=f"{objectives.name}, scaled", classes=classes)
