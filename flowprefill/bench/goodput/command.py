"""`flowprefill bench goodput`: the highest rate at which policies meet their objectives.

For each setting and target it searches the highest rate at which so large a share of a trace's
requests meets its objectives, on the same samples for all; then sweeps rates and SLO scales, looks
closely at one rate, and compares with a scheduler that knows all arrivals. docs/goodput.md.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flowprefill.bench.common import check_least, say
from flowprefill.bench.goodput import bounds, charts, png, results
from flowprefill.bench.goodput.chart import LineChart, Timeline
from flowprefill.bench.goodput.clairvoyant import clairvoyant, queue_knowing
from flowprefill.bench.goodput.lab import POINT_REQUESTS, Lab, Place, Starts
from flowprefill.bench.goodput.measurement import Backend, Measurement
from flowprefill.bench.goodput.page import page
from flowprefill.bench.goodput.records import Records
from flowprefill.bench.goodput.setting import (
    BASELINES,
    FEW,
    FORM,
    OURS,
    Setting,
    parse_all,
)
from flowprefill.bench.goodput.workload import (
    Workload,
    add_workload_arguments,
    check_workload,
    make_workload,
)
from flowprefill.bench.random_model import SHAPES, RandomCheckpoint
from flowprefill.bench.report import Report, Row, json_path, print_table
from flowprefill.errors import ConfigError
from flowprefill.traces import scaled_rate

LOADS = (0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.4, 1.7, 2.1)
SLO_SCALES = (0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0)
FINE_STEP, FINE_STRIDE = 1.005, 64  # of the rates' grid, where a measurement costs nothing
COARSE_STEP, COARSE_STRIDE = 1.05, 6  # in real time
GUESSED_STRIDE = 2  # from a simulated guess
IDEALS = {"clairvoyant heuristic": clairvoyant, "queue-knowing": queue_knowing}
SIM_SAMPLES, QUICK_SAMPLES = 12, 2
QUICK_SETTINGS = ("fcfs+none", "slack_edf+chunk:512", OURS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``flowprefill bench goodput``."""
    parser.add_argument("--backend", default="sim", help="sim, engine, or a server's http:// URL")
    parser.add_argument("--setting", action="append", metavar="S", help=f"{FORM}; several times")
    parser.add_argument("--ours", default=OURS, metavar="S",
                        help=f"compare the others with it, default {OURS}")  # fmt: skip
    parser.add_argument("--target", action="append", type=float, metavar="SHARE",
                        help="attainment, several times; sim: 0.9 and 0.99, else 0.9")  # fmt: skip
    parser.add_argument("--loads", type=float, nargs="*",
                        help="sweep these shares of the capacity; none: no sweep")  # fmt: skip
    parser.add_argument("--slo-scales", type=float, nargs="*", help="sweep these; none: no sweep")
    parser.add_argument("--rate-step", type=float, default=0.0, metavar="RATIO",
                        help="of the rates' grid; default: sim 1.005, else 1.05")  # fmt: skip
    parser.add_argument("--point-s", type=float, default=0.0, metavar="SECONDS",
                        help=f"serve what arrives so long at each rate, {POINT_REQUESTS} requests "
                        "at least; 0: all of the sample")  # fmt: skip
    parser.add_argument("--budget", type=float, default=0.0, metavar="MINUTES",
                        help="begin no measurement that may end later; 0 is no limit")  # fmt: skip
    parser.add_argument("--resume", type=json_path, metavar="FILE",
                        help="keep measurements there and go on from those it holds")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write goodput.html and PNGs")
    parser.add_argument("--json", type=json_path, metavar="FILE", help="write the report there")
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    add_workload_arguments(parser)
    sim = parser.add_argument_group("backend sim")
    sim.add_argument("--profile", default="llama-3.1-8b@a800", help="MODEL@MACHINE or a JSON file")
    sim.add_argument("--noise", type=float, default=0.0, help="sigma of true / predicted time")
    sim.add_argument("--bias", type=float, default=1.0, help="predicted / true time")
    sim.add_argument("--no-clairvoyant", action="store_true", help="leave the comparison out")
    sim.add_argument("--lookahead", type=float, nargs="*", default=[], metavar="SECONDS",
                     help="also an ideal scheduler that sees so far ahead")  # fmt: skip
    engine = parser.add_argument_group("backends engine and URL")
    engine.add_argument("--model", default="smollm2-135m", help="name, folder or .gguf file")
    engine.add_argument("--shape", choices=sorted(SHAPES),
                        help="random weights of this shape instead of a model")  # fmt: skip
    engine.add_argument("--one-engine", action="store_true",
                        help="load once for all measurements")  # fmt: skip
    engine.add_argument("--guess-profile", default="", metavar="PROFILE",
                        help="begin searches where a simulation of it ends")  # fmt: skip
    engine.add_argument("--dtype", default="auto", choices=("auto", "bf16", "f32"))
    engine.add_argument("--device", default="auto")
    engine.add_argument("--threads", type=int, default=0, help="0 is one per available core")
    engine.add_argument("--kv-cache-gib", type=float, default=2.0, help="default 2")
    engine.add_argument("--vocab-size", type=int, default=30_000, help="of the URL's model")


def run(args: argparse.Namespace) -> int:
    """Measure, print the tables, write JSON, HTML and PNGs."""
    _check(args)
    deadline_s = time.monotonic() + args.budget * 60 if args.budget else math.inf
    backend = _backend_of(args)
    workload = make_workload(args, backend.solo_s, getattr(backend, "max_model_len", 0))
    settings = _settings_of(args, backend)
    say(f"{backend.name}; {workload.description}")
    lab = _lab_of(args, backend, workload, deadline_s)
    report = Report("goodput", _described(args, settings, workload, lab))
    try:
        _measure(args, lab, settings, report, workload)
    except BaseException:  # an interrupt too: what was measured is worth keeping
        report.extra.setdefault("by_rate", results.measured(lab, settings))
        report.write(args.json)
        raise
    finally:
        lab.records.write()
        backend.close()
    report.write(args.json)
    return 0


def _check(args: argparse.Namespace) -> None:
    if args.backend not in ("sim", "engine") and not args.backend.startswith("http"):
        message = f"backend: got {args.backend!r}, expected sim, engine or a http:// URL"
        raise ConfigError(message, param="backend")
    check_workload(args)
    check_least("budget", args.budget, 0)
    check_least("threads", args.threads, 0)
    check_least("point_s", args.point_s, 0)
    if args.rate_step and not 1.001 <= args.rate_step <= 2:
        message = f"rate_step: got {args.rate_step}, expected a ratio in [1.001, 2]"
        raise ConfigError(message, param="rate_step")
    Setting.parse(args.ours)
    is_sim = args.backend == "sim"
    args.target = args.target or ([0.9, 0.99] if is_sim else [0.9])
    for target in args.target:
        if not 0 < target < 1:
            raise ConfigError(f"target: got {target}, expected a share in (0, 1)", param="target")
    if args.samples < 0:
        args.samples = SIM_SAMPLES if is_sim else 0
    if args.loads is None:
        args.loads = list(LOADS) if is_sim else []
    if args.slo_scales is None:
        args.slo_scales = list(SLO_SCALES) if is_sim else []
    for name in ("loads", "slo_scales"):
        for value in getattr(args, name):
            if not 0 < value <= 100:
                raise ConfigError(f"{name}: got {value}, expected numbers in (0, 100]", param=name)
    for value in args.lookahead:
        if not 0 <= value <= 1e6:
            raise ConfigError(f"lookahead: got {value}, expected numbers >= 0", param="lookahead")
    if args.quick:
        args.samples = min(args.samples, QUICK_SAMPLES)
        args.setting = args.setting or list(QUICK_SETTINGS)
        args.loads, args.slo_scales = args.loads[::4], args.slo_scales[::4]
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)


def _backend_of(args: argparse.Namespace) -> Backend:
    if args.backend == "sim":
        from flowprefill.bench.goodput.sim_backend import SimBackend

        role: Any = "mixed" if args.with_decode else "prefill"
        return SimBackend(args.profile, noise=args.noise, bias=args.bias, role=role)
    from flowprefill.bench.goodput.engine_backend import EngineBackend, UrlBackend

    if args.backend == "engine":
        names = ("dtype", "device", "threads", "kv_cache_gib")
        settings = {name: getattr(args, name) for name in names}
        shape = args.shape
        model = RandomCheckpoint(shape, SHAPES[shape]()) if shape else args.model
        say("loading, calibrating, and measuring prompts alone")
        found = EngineBackend(model, keeps_engine=args.one_engine, **settings)
        say(f"engine on {found.description['device']}, started in "
            f"{found.description['start_s']:.1f} s; "
            f"products {found.rates.gemm_flops_per_s / 1e12:.1f} TFLOP/s, "
            f"attention {found.rates.attention_flops_per_s / 1e12:.1f}")  # fmt: skip
        return found
    return UrlBackend(args.backend, args.vocab_size)


def _settings_of(args: argparse.Namespace, backend: Backend) -> list[Setting]:
    if args.backend.startswith("http"):
        if args.setting:
            raise ConfigError("setting: a server at a URL has its own, expected none")
        return [Setting.parse(args.ours)]  # a name only
    if args.setting:
        return parse_all(args.setting)
    names = BASELINES if backend.is_fast else FEW
    return list(dict.fromkeys(one.scaled(args.length_scale) for one in parse_all(names)))


def _lab_of(
    args: argparse.Namespace, backend: Backend, workload: Workload, deadline_s: float
) -> Lab:
    step = args.rate_step or (FINE_STEP if backend.is_fast else COARSE_STEP)
    names = (
        "trace", "requests", "format", "start_s", "length_s", "objectives", "slo_scale",
        "carry_slo", "ttft_only", "length_scale", "max_tokens", "with_decode", "samples",
        "sample_s", "block_s", "seed", "quick", "profile", "noise", "bias", "model",
        "dtype", "threads",
    )  # fmt: skip
    identity: dict[str, Any] = {name: getattr(args, name) for name in names}
    identity |= {"trace": str(args.trace), "backend": backend.name, "step": step}
    identity |= {name: getattr(args, name) for name in ("shape", "point_s") if getattr(args, name)}
    records = Records(args.resume, identity)
    if len(records):
        say(f"{len(records)} measurements are in {args.resume} already")
    return Lab(
        backend, workload.samples, workload.base_rps, records, step, args.seed, deadline_s,
        Setting.parse(args.ours), args.point_s or math.inf,
    )  # fmt: skip


def _described(
    args: argparse.Namespace, settings: Sequence[Setting], workload: Workload, lab: Lab
) -> dict[str, Any]:
    left_out = ("run", "setting", "json", "resume", "out")
    given = {key: value for key, value in vars(args).items() if key not in left_out}
    given["trace"] = str(args.trace) if args.trace else None
    return given | {
        "settings": [str(one) for one in settings],
        "workload": workload.description,
        "objectives_s": workload.objectives_s,
        "seeds": [args.seed + number for number in range(len(lab.samples))],
        "capacity_rps": lab.capacity_rps,
        "backend": lab.backend.name,
        "engine": getattr(lab.backend, "description", None),
    }


def _measure(
    args: argparse.Namespace,
    lab: Lab,
    settings: Sequence[Setting],
    report: Report,
    workload: Workload,
) -> None:
    say(f"capacity, one after another: {lab.capacity_rps:.2f} requests/s")
    stride = FINE_STRIDE if lab.backend.is_fast else COARSE_STRIDE
    starts = None
    if not lab.backend.is_fast and args.guess_profile:
        starts, stride = _guessed(args, lab, settings), GUESSED_STRIDE
    found = lab.searches(settings, args.target, stride, starts)
    ideals, calibration = _ideals(args, lab, found)
    report.rows = results.rows_of(lab, found, ideals)
    rates = [results.told(row) for row in report.rows]
    print_table("Highest rates", rates, results.COLUMNS)
    tables: list[Any] = [("Highest rates", rates, results.COLUMNS)]
    if ideals is not None:
        tables.append(("Against ideal schedulers", rates, results.IDEAL_COLUMNS))
        print_table("Against ideal schedulers", rates, results.IDEAL_COLUMNS)
        report.extra["calibration"] = calibration
        tables.append(("Clairvoyant heuristic", calibration, bounds.CALIBRATION_COLUMNS))
        print_table("Clairvoyant heuristic", calibration, bounds.CALIBRATION_COLUMNS)
        if args.lookahead:
            seeing = bounds.lookahead_rows(lab, args.lookahead, ideals.clairvoyant)
            report.extra["lookahead"] = seeing
            tables.append(("Worth of seeing ahead", seeing, bounds.LOOKAHEAD_COLUMNS))
            print_table("Worth of seeing ahead", seeing, bounds.LOOKAHEAD_COLUMNS)
    rate_rps = _common_rate(args, lab, report.rows)
    drawn = _sweeps(args, lab, settings, report, tables, (rate_rps, ideals is not None))
    portraits = _portraits(lab, settings, rate_rps)
    preemptions = charts.preemption_rows(portraits)
    report.extra["at_one_rate"] = {"rate_rps": rate_rps, "rows": preemptions}
    title = f"At {rate_rps:.2f} requests/s"
    print_table(title, preemptions, charts.PREEMPTION_COLUMNS)
    tables.append((title, preemptions, charts.PREEMPTION_COLUMNS))
    if args.out is not None:
        step = lab.step ** lab.index_of(rate_rps)
        requests = scaled_rate(lab.samples[0], step).requests
        drawn += charts.ttft_charts(portraits, workload.objectives_s, rate_rps)
        drawn += [
            charts.blocking_chart(portraits, rate_rps),
            charts.timeline_chart(portraits, requests),
        ]
        _write(args.out, report, tables, drawn, workload)


def _guessed(args: argparse.Namespace, lab: Lab, settings: Sequence[Setting]) -> Starts:
    """Simulate the searches on a profile, and scale what they find to the speed measured here.

    Only where searches begin depends on it; a good guess saves most of the slow measurements.
    """
    from flowprefill.bench.goodput.sim_backend import SimBackend

    role: Any = "mixed" if args.with_decode else "prefill"
    simulator = SimBackend(args.guess_profile, role=role)
    measured = getattr(lab.backend, "rates", None)
    if measured is not None:
        simulator.profile = simulator.profile.with_rates(
            gemm_flops_per_s=measured.gemm_flops_per_s,
            attention_flops_per_s=measured.attention_flops_per_s,
        )
    virtual = replace(lab, backend=simulator, records=Records(None, {}), places={})
    found = virtual.searches(settings, args.target, COARSE_STRIDE)
    faster = lab.capacity_rps / virtual.capacity_rps
    starts: dict[tuple[Setting, float], list[int | None]] = {}
    for (setting, target), searches in found.items():
        rates = results.rates_of(virtual, searches)
        starts[setting, target] = [
            None if rate is None else lab.index_of(rate * faster) for rate in rates
        ]
        told = ", ".join("none" if rate is None else f"{rate * faster:.2f}" for rate in rates)
        say(f"guess for {setting!s} at {target:g}: {told} requests/s")
    return starts


def _ideals(
    args: argparse.Namespace, lab: Lab, found: results.Found
) -> tuple[results.Ideals | None, list[Row]]:
    """Return ideal schedulers' rates and the heuristic's calibration, where times are known."""
    least_s = getattr(lab.backend, "least_s", None)
    if least_s is None or args.no_clairvoyant or args.with_decode:
        return None, []
    say("ideal schedulers")
    best = {target: bounds.searches_of(lab, clairvoyant, target) for target in args.target}
    online = {target: bounds.searches_of(lab, queue_knowing, target) for target in args.target}
    ideals = results.Ideals(
        {target: results.rates_of(lab, ones) for target, ones in best.items()},
        {target: results.rates_of(lab, ones) for target, ones in online.items()},
        {key: bounds.shares_of_requests(lab, ones) for key, ones in found.items()},
    )
    return ideals, bounds.calibration(lab, best[args.target[0]], least_s)


def _common_rate(args: argparse.Namespace, lab: Lab, rows: Sequence[Row]) -> float:
    """Return ours' highest rate at the first target, or the highest of any, or a load of 0.7."""
    ours = results.mean_rate(rows, lab.ours, args.target[0])
    known = [row["max_rate_rps"] for row in rows if row["samples"]]
    return ours or max(known, default=0.7 * lab.capacity_rps)


def _sweeps(
    args: argparse.Namespace,
    lab: Lab,
    settings: Sequence[Setting],
    report: Report,
    tables: list[Any],
    at: tuple[float, bool],
) -> list[LineChart | Timeline]:
    rate_rps, has_ideals = at
    drawn: list[LineChart | Timeline] = []
    if args.loads:
        say(f"sweep of {len(args.loads)} rates")
        indices = [lab.index_of(load * lab.capacity_rps) for load in args.loads]
        rows = results.sweep(lab, settings, indices, [1.0])
        report.extra["by_rate"] = rows
        against = results.against_ours(rows, lab.ours)
        tables.append(("Ours against each, over the sweep of rates", against,
                       results.AGAINST_COLUMNS))  # fmt: skip
        print_table("Ours against each", against, results.AGAINST_COLUMNS)
        if has_ideals:
            for name, ideal in IDEALS.items():
                rows += bounds.sweep_rows(lab, indices, ideal, name)
        tables.append(("Sweep of rates", rows, results.SWEEP_COLUMNS))
    else:
        rows = results.measured(lab, settings)
        report.extra["by_rate"] = rows
        tables.append(("Measured rates", rows, results.SWEEP_COLUMNS))
        print_table("Measured rates", rows, results.SWEEP_COLUMNS)
    drawn.append(charts.by_rate(rows, settings, args.target))
    if args.slo_scales:
        say(f"sweep of {len(args.slo_scales)} SLO scales")
        rows = results.sweep(lab, settings, [lab.index_of(rate_rps)], args.slo_scales)
        report.extra["by_slo_scale"] = rows
        tables.append(("Sweep of SLO scales", rows, results.SWEEP_COLUMNS))
        drawn.append(charts.by_slo_scale(rows, settings, rate_rps))
    return drawn


def _portraits(
    lab: Lab, settings: Sequence[Setting], rate_rps: float
) -> dict[Setting, Measurement]:
    """Look closely at every setting on the first sample at one rate."""
    index = lab.index_of(rate_rps)
    found = {}
    for setting in settings:
        measured = lab.at(Place(setting, 0, index), is_detailed=True)
        if measured is not None:
            found[setting] = measured
    return found


def _write(
    folder: Path,
    report: Report,
    tables: Sequence[Any],
    drawn: Sequence[LineChart | Timeline],
    workload: Workload,
) -> None:
    whole = report.to_dict()
    names = ("machine", "commit", "command", "started", "duration_s", "settings")
    about = {name: whole[name] for name in names}
    notes = [
        workload.description,
        f"Backend: {report.settings['backend']}.",
        "Intervals: 95 %, of paired samples.",
    ]
    drawn = [one for one in drawn if (one.series if isinstance(one, LineChart) else one.rows)]
    text = page("Goodput", notes, tables, drawn, about)
    (folder / "goodput.html").write_text(text, encoding="utf-8")
    try:
        png.draw(drawn, folder)
    except ImportError:
        say("no PNGs: matplotlib is not installed")
    say(f"wrote {folder / 'goodput.html'}")
