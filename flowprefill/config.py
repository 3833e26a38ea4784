"""EngineConfig: every setting of the engine, with its check; the CLI's flags come from it.

Unknown keys and bad values stop the start with the key, the value and what is allowed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from flowprefill.errors import ConfigError, InvalidRequest, shortened, within
from flowprefill.request import SLO

AdmissionMode = Literal["off", "demote", "reject"]

GIB = 1 << 30  # bytes
POLICIES = ("slack_edf", "s_edf_paper", "edf", "fcfs", "shortest_first", "priority")
GRANULARITIES = "budget:MS (milliseconds), operator, layer, none or chunk:N (tokens)"
COARSE_BLOCKING_S = 0.02  # what the scheduler assumes where segments have no budget
QUANTIZATIONS = ("auto", "none", "int8", "gguf", "fp8")
DEVICES = "auto, cpu, cuda or cuda:N"
ADMISSION_MODES = ("off", "demote", "reject")
CLASS_KEYS = ("ttft_ms", "tpot_ms", "on_miss", "weight", "share", "background", "admission")
MAX_OBJECTIVE_MS = 86_400_000
MAX_SHARES = 0.9  # of all classes together; the rest belongs to deadlines
SLICE_COST = 3  # what a slice of late_share may cost: to begin and to end it takes a segment each
_DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,3})?")
_GRANULARITY = re.compile(r"(budget):(\d+(?:\.\d+)?)|(chunk):(\d+)|(operator|layer|none)")


def _bad(name: str, value: Any, allowed: str) -> ConfigError:
    return ConfigError(f"{name}: got {shortened(value)}, expected {allowed}", param=name)


@dataclass(frozen=True, slots=True)
class Granularity:
    """How a prefill is cut into segments.

    Attributes:
        kind: ``budget``, ``operator``, ``layer``, ``none`` or ``chunk``.
        budget_s: longest wanted segment, seconds (kind ``budget``).
        chunk_tokens: rows of a chunk (kind ``chunk``).
    """

    kind: str
    budget_s: float = 0.0
    chunk_tokens: int = 0

    @classmethod
    def parse(cls, text: str) -> Granularity:
        """Parse ``budget:2``, ``chunk:512``, ``operator``, ``layer`` or ``none``."""
        match = _GRANULARITY.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise _bad("granularity", text, GRANULARITIES)
        if match[1]:
            budget_s = float(match[2]) / 1e3
            if not 1e-4 <= budget_s <= 10.0:
                raise _bad("granularity", text, "budget:MS with MS in 0.1..10000")
            return cls("budget", budget_s=budget_s)
        if match[3]:
            if not 16 <= int(match[4]) <= 1_000_000:
                raise _bad("granularity", text, "chunk:N with N in 16..1000000")
            return cls("chunk", chunk_tokens=int(match[4]))
        return cls(match[5])

    @property
    def max_blocking_s(self) -> float:
        """Longest segment that the scheduler expects, seconds."""
        return self.budget_s or COARSE_BLOCKING_S

    def __str__(self) -> str:
        if self.kind == "budget":
            return f"budget:{self.budget_s * 1e3:g}"
        return f"chunk:{self.chunk_tokens}" if self.kind == "chunk" else self.kind


@dataclass(frozen=True, slots=True)
class ServiceClass:
    """What the operator promises and allows one class of requests.

    Attributes:
        slo: its objectives.
        weight: how much one of its requests on time counts against one of another class.
        share: of the device's time, guaranteed while its requests wait; 0 is none.
        is_background: served only while nothing else wants the device.
        admission: what happens to a request that is predicted late; see EngineConfig.admission.
    """

    slo: SLO
    weight: float = 1.0
    share: float = 0.0
    is_background: bool = False
    admission: AdmissionMode = "off"


PLAIN_CLASS = ServiceClass(SLO())  # of requests whose class is not configured


def _setting(default: Any, doc: str, **extra: Any) -> Any:
    return field(default=default, metadata={"doc": doc, **extra})


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Settings of one engine; each field's ``metadata['doc']`` is its help text."""

    dtype: str = _setting(
        "auto", "auto, bf16 or f32; auto is bf16 on GPUs and where the CPU computes it fast"
    )
    quantization: str = _setting(
        "auto",
        "auto, none, int8, gguf or fp8: in which form weights of products are kept. int8, on the "
        "CPU: in 8 bits, and what is multiplied with them; gguf, on the CPU: a GGUF file's as they "
        "are quantised; fp8, on GPUs of compute capability 8.9 or more: as e4m3, a checkpoint's "
        "own or rounded when it is loaded, and what is multiplied with them; none: in dtype; auto: "
        "on the CPU gguf for a model that would take more than 1 GiB otherwise, else none",
    )
    device: str = _setting("auto", f"{DEVICES}; auto is the first usable GPU, else the CPU")
    threads: int = _setting(
        0, "compute threads; 0 is one per available core, no more than a control group's quota"
    )
    background: bool = _setting(
        False,
        "run compute threads under SCHED_IDLE: steadier control plane, yields to every process",
    )
    policy: str = _setting("slack_edf", "one of " + ", ".join(POLICIES))
    granularity: str = _setting(
        "auto", f"{GRANULARITIES}; auto is budget:2 on the CPU, budget:0.5 on GPUs"
    )
    run_ahead: int = _setting(
        1,
        "segments that are launched ahead of the one a GPU executes, 1 to 4: blocking is at most "
        "one segment more; above 1 only where launches take longer than segments",
    )
    max_model_len: int = _setting(
        0, "longest prompt plus output, tokens; 0 is the model's own, on GPUs 32768 at most"
    )
    kv_cache_gib: float = _setting(
        0.0,
        "memory for the KV cache, GiB; 0 is 1 on the CPU, or half of what a control group's limit "
        "leaves if that is less, and most of what is free on a GPU",
    )
    block_tokens: int = _setting(64, "tokens of one KV block: 16, 32, 64 or 128")
    prefix_cache: bool = _setting(True, "reuse KV blocks of equal prompt prefixes")
    max_running: int = _setting(
        0, "most sequences in one decode step; 0 is 64 on the CPU, 256 on GPUs"
    )
    max_batch_tokens: int = _setting(512, "most prompt tokens packed in one prefill batch")
    max_waiting: int = _setting(10_000, "most requests waiting; more are answered 429")
    max_waiting_tokens: int = _setting(
        4_000_000, "most prompt tokens waiting; more are answered 429; 0 is no limit"
    )
    max_backlog_s: float = _setting(
        300.0,
        "longest predicted time until all that waits has its first token, seconds; more is "
        "answered 429; 0 is no limit. Counts only where the machine is calibrated",
    )
    tenant_share: float = _setting(
        1.0, "most of those three bounds that one tenant may use, a share in (0, 1]"
    )
    admission: str = _setting(
        "off",
        "what happens to a request that is predicted late, or to make an admitted one late: off "
        "(nothing), demote (it becomes best effort) or reject (429)",
    )
    late_share: float = _setting(
        0.005,
        "share of the time that slack_edf gives requests that are late or have no TTFT objective "
        "while others could use all of it; at most a third of what the classes' shares leave",
    )
    default_ttft_ms: float = _setting(0.0, "TTFT objective of requests that name none; 0 is none")
    default_tpot_ms: float = _setting(0.0, "TPOT objective of requests that name none; 0 is none")
    classes: Mapping[str, Mapping[str, Any]] = field(
        default_factory=dict,
        metadata={"doc": "service classes: name -> {" + ", ".join(CLASS_KEYS) + "}"},
    )
    calibrate: bool = _setting(True, "measure this machine at start (cached on disk)")
    cache_dir: str = _setting("", "where calibration is kept; empty is the user's cache folder")
    chat_template: str = _setting(
        "", "file of a jinja2 chat template; empty: the model's own is used"
    )

    def __post_init__(self) -> None:
        if self.dtype not in ("auto", "bf16", "f32"):
            raise _bad("dtype", self.dtype, "auto, bf16 or f32")
        if self.quantization not in QUANTIZATIONS:
            raise _bad("quantization", self.quantization, " or ".join(QUANTIZATIONS))
        if not isinstance(self.device, str) or not _DEVICE.fullmatch(self.device):
            raise _bad("device", self.device, DEVICES)
        if self.policy not in POLICIES:
            raise _bad("policy", self.policy, "one of " + ", ".join(POLICIES))
        if self.granularity != "auto":
            Granularity.parse(self.granularity)
        if self.block_tokens not in (16, 32, 64, 128):
            raise _bad("block_tokens", self.block_tokens, "16, 32, 64 or 128")
        if self.admission not in ADMISSION_MODES:
            raise _bad("admission", self.admission, "one of " + ", ".join(ADMISSION_MODES))
        self._check_kinds()
        self._check_ranges()
        self._check_classes()

    def _check_kinds(self) -> None:
        """Refuse what no flag can be but a file may hold: ``"no"`` would count as true."""
        kinds = {bool: "true or false", str: "a text"}
        for one in fields(self):
            value, kind = getattr(self, one.name), type(one.default)
            if kind in kinds and not isinstance(value, kind):
                raise _bad(one.name, value, kinds[kind])
        for name in ("cache_dir", "chat_template"):
            if "\0" in getattr(self, name):
                raise _bad(name, getattr(self, name), "a path")

    def _check_classes(self) -> None:
        if not isinstance(self.classes, Mapping):
            raise _bad("classes", self.classes, "an object of name: class")
        shares = math.fsum(self.service_class(name).share for name in self.classes)
        if shares > MAX_SHARES:
            raise _bad("classes", round(shares, 6), f"shares of at most {MAX_SHARES} in all")
        most = (1 - shares) / SLICE_COST
        if self.late_share > most:
            allowed = f"at most {most:.3f}: the classes' shares are {shares:.3g} in all"
            raise _bad("late_share", self.late_share, allowed)

    def _check_ranges(self) -> None:
        ranges: dict[str, tuple[float, float]] = {
            "threads": (0, 1024), "run_ahead": (1, 4),
            "max_model_len": (0, 10_000_000), "kv_cache_gib": (0, 65_536),
            "max_running": (0, 4096), "max_batch_tokens": (1, 1_000_000),
            "max_waiting": (1, 10_000_000), "max_waiting_tokens": (0, 2**53),
            "max_backlog_s": (0, 86_400), "tenant_share": (0.001, 1),
            "late_share": (0.001, 0.3),
            "default_ttft_ms": (0, 86_400_000), "default_tpot_ms": (0, 86_400_000),
        }  # fmt: skip
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            is_real = isinstance(type(self).__dataclass_fields__[name].default, float)
            kinds = (int, float) if is_real else (int,)
            if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
                kind = "a number" if is_real else "an integer"
                raise _bad(name, value, f"{kind} {within(low, high)}")

    def slo_of_class(self, name: str) -> SLO:
        """Return the SLO of a configured service class; unknown names raise ConfigError."""
        if name not in self.classes:
            known = ", ".join(sorted(self.classes)) or "none configured"
            raise _bad("service class", name, f"one of: {known}")
        return self.service_class(name).slo

    def service_class(self, name: str) -> ServiceClass:
        """Return the class of that name; one that is not configured has no promises.

        Raises:
            ConfigError: the class is described wrongly.
        """
        spec = self.classes.get(name, {})
        key = f"classes.{name}"
        if not isinstance(spec, Mapping):
            raise _bad(key, spec, "an object with the keys " + ", ".join(CLASS_KEYS))
        unknown = set(spec) - set(CLASS_KEYS)
        if unknown:
            raise _bad(key, sorted(unknown), "keys " + ", ".join(CLASS_KEYS))
        admission = spec.get("admission", self.admission)
        if admission not in ADMISSION_MODES:
            raise _bad(f"{key}.admission", admission, "one of " + ", ".join(ADMISSION_MODES))
        is_background = spec.get("background", False)
        if not isinstance(is_background, bool):
            raise _bad(f"{key}.background", is_background, "true or false")
        if name == "background" and spec and not is_background:
            raise _bad(f"{key}.background", False, "true: the name says so")
        weight = _number(f"{key}.weight", spec.get("weight", 1.0), 1e-3, 1e3)
        share = _number(f"{key}.share", spec.get("share", 0.0), 0.0, MAX_SHARES)
        slo = _class_slo(name, spec)
        if is_background and (share or slo.ttft is not None or slo.tpot is not None):
            allowed = "without ttft_ms, tpot_ms and share: background waits for all other classes"
            raise _bad(f"{key}.background", True, f"false, or a class {allowed}")
        return ServiceClass(slo, weight, share, is_background, admission)

    def class_shares(self) -> dict[str, float]:
        """Return the guaranteed shares of the classes that have one."""
        shares = {name: self.service_class(name).share for name in self.classes}
        return {name: share for name, share in shares.items() if share}

    def default_slo(self) -> SLO:
        """Return the SLO of requests that name none: class ``default``, else the defaults."""
        if "default" in self.classes:
            return self.slo_of_class("default")
        return SLO(ttft=self.default_ttft_ms / 1e3 or None, tpot=self.default_tpot_ms / 1e3 or None)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> EngineConfig:
        """Build from a dictionary, e.g. a parsed config file or the CLI's flags."""
        known = {f.name for f in fields(cls)}
        for key in values:
            if key not in known:
                raise _bad("setting", key, "one of " + ", ".join(sorted(known)))
        return cls(**values)


def _number(name: str, value: Any, low: float, high: float) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:
        raise _bad(name, value, f"a number {within(low, high)}")
    return float(value)


def _class_slo(name: str, spec: Mapping[str, Any]) -> SLO:
    try:
        return SLO(
            ttft=_objective_s(name, spec, "ttft_ms"),
            tpot=_objective_s(name, spec, "tpot_ms"),
            service_class=name,
            on_miss=spec.get("on_miss", "demote"),
        )
    except InvalidRequest as error:
        raise ConfigError(f"classes.{name}: {error}", param=f"classes.{name}") from None


def _objective_s(name: str, spec: Mapping[str, Any], key: str) -> float | None:
    value = spec.get(key)
    if value is None:
        return None
    number = _number(f"classes.{name}.{key}", value, 0.0, MAX_OBJECTIVE_MS)
    if number == 0.0:
        raise _bad(f"classes.{name}.{key}", value, f"milliseconds in (0, {MAX_OBJECTIVE_MS:.0f}]")
    return number / 1e3


def parse_json(text: str) -> Any:
    """Parse a JSON text; raises ValueError (for halves of surrogate pairs too), RecursionError."""
    value = json.loads(text)
    json.dumps(value, ensure_ascii=False).encode()
    return value


def read_object(what: str, path: str | Path) -> dict[str, Any]:
    """Read a JSON file that holds one object.

    Raises:
        ConfigError: begins with what the file is and its path; the first word is the param.
    """
    param = what.split()[0]
    name = f"{what} {str(path)!r}"
    try:
        values = parse_json(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{name}: {error.strerror}", param=param) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{name}: not JSON ({error})", param=param) from None
    if not isinstance(values, dict):
        raise ConfigError(f"{name}: expected a JSON object", param=param)
    return values


def settings_table() -> str:
    """Return all settings as a Markdown table; docs/configuration.md holds it, a test compares."""
    lines = ["| setting | default | meaning |", "|---|---|---|"]
    for one in fields(EngineConfig):
        default = one.default if one.default is not MISSING else {}
        lines.append(f"| `{one.name}` | `{json.dumps(default)}` | {one.metadata['doc']} |")
    return "\n".join(lines)
