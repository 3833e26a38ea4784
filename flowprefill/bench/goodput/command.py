"""`flowprefill bench goodput`: the highest rate at which policies meet their objectives.

For each setting and target it searches the highest rate at which so large a share of a trace's
requests meets its objectives, on the same samples for all; then sweeps rates and SLO scales, looks
closely at one rate, and compares with a scheduler that knows all arrivals. Or it measures at given
rates alone. docs/goodput.md.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flowprefill.bench.common import say
from flowprefill.bench.goodput import bounds, charts, png, results
from flowprefill.bench.goodput.arguments import check_arguments
from flowprefill.bench.goodput.chart import LineChart, Timeline
from flowprefill.bench.goodput.clairvoyant import clairvoyant, queue_knowing
from flowprefill.bench.goodput.lab import Lab, Place, Starts
from flowprefill.bench.goodput.measurement import Backend, Measurement
from flowprefill.bench.goodput.page import page
from flowprefill.bench.goodput.records import Records
from flowprefill.bench.goodput.setting import (
    BASELINES,
    FEW,
    Setting,
    parse_all,
)
from flowprefill.bench.goodput.workload import (
    Workload,
    make_workload,
)
from flowprefill.bench.random_model import SHAPES, RandomCheckpoint
from flowprefill.bench.report import Report, Row, print_table
from flowprefill.traces import scaled_rate

FINE_STEP, FINE_STRIDE = 1.005, 64  # of the rates' grid, where a measurement costs nothing
COARSE_STEP, COARSE_STRIDE = 1.05, 6  # in real time
GUESSED_RATIO = 1.1  # of rates, the first step from a simulated guess
IDEALS = {"clairvoyant heuristic": clairvoyant, "queue-knowing": queue_knowing}


def run(args: argparse.Namespace) -> int:
    """Measure, print the tables, write JSON, HTML and PNGs."""
    check_arguments(args)
    deadline_s = time.monotonic() + args.budget * 60 if args.budget else math.inf
    backend = _backend_of(args)
    workload = make_workload(args, backend.solo_s, getattr(backend, "max_model_len", 0))
    settings = _settings_of(args, backend)
    say(f"{backend.name}; {workload.description}")
    lab = _lab_of(args, backend, workload, deadline_s)
    report = Report("goodput", _described(args, settings, workload, lab))
    try:
        (_at_rates if args.rates else _measure)(args, lab, settings, report, workload)
    except BaseException:  # an interrupt too: what was measured is worth keeping
        report.extra.setdefault("by_rate", results.measured(lab, settings))
        report.write(args.json)
        raise
    finally:
        lab.records.write()
        backend.close()
    report.write(args.json)
    return 0


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
        starts = _guessed(args, lab, settings)
        stride = max(round(math.log(GUESSED_RATIO) / math.log(lab.step)), 1)
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


def _at_rates(
    args: argparse.Namespace,
    lab: Lab,
    settings: Sequence[Setting],
    report: Report,
    workload: Workload,
) -> None:
    indices = list(dict.fromkeys(lab.index_of(rate) for rate in args.rates))
    report.rows = results.sweep(lab, settings, indices, [1.0])
    print_table("At these rates", report.rows, results.SWEEP_COLUMNS)
    if args.out is not None:
        tables = [("At these rates", report.rows, results.SWEEP_COLUMNS)]
        drawn = [charts.by_rate(report.rows, settings, args.target)]
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
