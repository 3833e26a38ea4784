"""Profile: a model on a machine as data, read from profiles/*.json; what a simulation predicts by.

A profile's name is `MODEL@MACHINE`. Machine files hold rates per device with their source and the
assumed efficiency; model files hold the model's configuration and on how many devices it runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from flowprefill.config import read_object
from flowprefill.engine.loading import model_shape
from flowprefill.errors import ConfigError
from flowprefill.models.families import build_graph, read_config
from flowprefill.models.graph import ModelGraph
from flowprefill.native import _core
from flowprefill.scheduling import MachineRates, ModelShape

FOLDER = Path(__file__).parent / "profiles"


@dataclass(frozen=True)
class Profile:
    """A model on a machine. All rates are of all its devices together.

    Attributes:
        name: `MODEL@MACHINE`, or the path of the file it was read from.
        source: where the figures come from and what is assumed.
        graph: the model as the planner sees it.
        shape: what the model asks of the machine.
        rates: what the machine does per second; the overhead is that of one run.
        step_overhead_s: of each step that the planner makes.
        sequence_overhead_s: what each sequence adds to a decode step besides reading its cache:
            sampling, bookkeeping, and products where they take turns with reading the weights.
        cuts: the device's cutting rules.
        response_s: from the end of a prefill to its token at the client, and what comes before the
            scheduler hears of it; occupies no device.
        segments_in_flight: segments that a preemption waits for at most; 1: the one that executes.
    """

    name: str
    source: str
    graph: ModelGraph = field(repr=False)
    shape: ModelShape
    rates: MachineRates
    step_overhead_s: float = 5e-6
    sequence_overhead_s: float = 0.0
    cuts: _core.CutRules = field(default_factory=_core.CutRules, repr=False)
    response_s: float = 0.0
    segments_in_flight: int = 1

    @classmethod
    def load(cls, name: str) -> Profile:
        """Return a built-in profile, `MODEL@MACHINE`, or one from a JSON file with both objects.

        Raises:
            ConfigError: no such profile, or the file is not one; says which there are.
        """
        if name.endswith(".json"):
            parts = read_object("profile", name)
            return _join(name, _object(name, parts, "model"), _object(name, parts, "machine"))
        model, _, machine = name.partition("@")
        if model not in _stems("model") or machine not in _stems("machine"):
            raise ConfigError(
                f"profile: got {name!r}, expected MODEL@MACHINE, models {_stems('model')}, "
                f"machines {_stems('machine')}, or a .json file",
                param="profile",
            )
        files = (FOLDER / f"model-{model}.json", FOLDER / f"machine-{machine}.json")
        return _join(name, *(read_object("profile", path) for path in files))

    @staticmethod
    def names() -> list[str]:
        """Return the names of the built-in profiles."""
        return [f"{model}@{machine}" for model in _stems("model") for machine in _stems("machine")]

    @staticmethod
    def sources(kind: Literal["model", "machine"]) -> dict[str, str]:
        """Return where the figures of each built-in model or machine come from, by name."""
        files = {stem: FOLDER / f"{kind}-{stem}.json" for stem in _stems(kind)}
        return {stem: read_object("profile", path)["source"] for stem, path in files.items()}

    @cached_property
    def predictor(self) -> _core.PlanPredictor:
        """The planner on this model with this device's cutting rules."""
        return _core.PlanPredictor(self.graph, self.cuts)

    def with_rates(self, **rates: float) -> Profile:
        """Return the same with some rates changed, e.g. to those that were measured."""
        return replace(self, rates=replace(self.rates, **rates))


def _stems(kind: str) -> list[str]:
    return sorted(path.stem.removeprefix(f"{kind}-") for path in FOLDER.glob(f"{kind}-*.json"))


def _object(name: str, parts: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = parts.get(key)
    if not isinstance(value, dict):
        raise ConfigError(f"profile {name}: {key}: expected an object", param="profile")
    return value


def _number(name: str, values: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = values.get(key, default)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not (math.isfinite(value) and value > 0):
        raise ConfigError(
            f"profile {name}: {key}: got {value!r}, expected a number > 0", param="profile"
        )
    return float(value)


def _cuts(name: str, machine: Mapping[str, Any]) -> _core.CutRules:
    """Return the cutting rules: those of a CPU with so many threads, of a GPU, or by field."""
    if "threads" in machine:
        return _core.cpu_cuts("bf16", int(_number(name, machine, "threads")))
    if machine.get("cuts") == "cuda":
        return _core.cuda_cuts()
    fields = machine.get("cuts", {})
    if not isinstance(fields, dict):
        message = f"profile {name}: cuts: got {fields!r}, expected 'cuda' or an object"
        raise ConfigError(message, param="profile")
    try:
        return _core.CutRules(**fields)
    except (TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"profile {name}: cuts: {reason}", param="profile") from None


def _join(name: str, model: Mapping[str, Any], machine: Mapping[str, Any]) -> Profile:
    """Put a model on a machine: rates of several devices together, links counted."""

    def given(key: str, default: float | None = None) -> float:
        return _number(name, machine, key, default)

    def optional(key: str) -> float:
        return given(key) if key in machine else 0.0

    config = _object(name, model, "config")
    graph = build_graph(read_config(config))
    devices = int(_number(name, model, "devices", 1))
    together = devices * (given("link_efficiency", 1.0) if devices > 1 else 1.0)
    shape = model_shape(graph, "bf16")
    rates = MachineRates(
        gemm_flops_per_s=given("gemm_flops_per_s")
        * together
        * _number(name, model, "linear_efficiency", 1.0),
        attention_flops_per_s=given("attention_flops_per_s") * together,
        weight_bytes_per_s=given("memory_bytes_per_s") * devices,
        run_overhead_s=given("run_overhead_s"),
    )
    return Profile(
        name=name,
        source=f"{model.get('source', '')} {machine.get('source', '')}".strip(),
        graph=graph,
        shape=shape,
        rates=rates,
        step_overhead_s=given("step_overhead_s", 5e-6),
        sequence_overhead_s=optional("sequence_overhead_s"),
        cuts=_cuts(name, machine),
        response_s=optional("response_s"),
        segments_in_flight=int(given("segments_in_flight", 1)),
    )
