"""Charts of `bench goodput`, made from its rows and measurements. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flowprefill.bench.goodput.chart import Block, LineChart, Series, Timeline, cumulative
from flowprefill.bench.goodput.measurement import Measurement
from flowprefill.bench.goodput.setting import OURS, Setting
from flowprefill.bench.report import Row
from flowprefill.traces import TraceRequest

EXCERPT_S = 12.0  # of a timeline
MS = 1e3
TTFT_RANGE = (0.02, 50.0)  # of TTFT over objective


def colours(settings: Sequence[Setting]) -> dict[str, int]:
    """Give ours the first colour and each other one its own, the same in every chart."""
    names = [str(one) for one in settings]
    ordered = sorted(names, key=lambda name: name != OURS)
    return {name: number for number, name in enumerate(ordered)}


def by_rate(
    rows: Sequence[Row], settings: Sequence[Setting], targets: Sequence[float]
) -> LineChart:
    """Draw attainment against rate, from 0 on, so that lengths along the axis compare."""
    lines = _lines(rows, settings, "rate_rps")
    most = max((one.points[-1][0] for one in lines), default=1.0)
    return LineChart(
        "attainment-by-rate", "Requests on time against rate", "requests per second",
        "share on time", lines, marks=targets, x_range=(0.0, most), y_range=(0.0, 1.0),
    )  # fmt: skip


def by_slo_scale(rows: Sequence[Row], settings: Sequence[Setting], rate_rps: float) -> LineChart:
    """Draw attainment against the scale of all objectives at one rate."""
    return LineChart(
        "attainment-by-slo", f"Requests on time against SLO scale, {rate_rps:.2f} requests/s",
        "objectives times", "share on time", _lines(rows, settings, "slo_scale"),
        marks=(0.9,), y_range=(0.0, 1.0),
    )  # fmt: skip


def _lines(rows: Sequence[Row], settings: Sequence[Setting], x_name: str) -> list[Series]:
    number = colours(settings)
    others = [row["setting"] for row in rows if row["setting"] not in number]
    number |= {name: len(number) + n for n, name in enumerate(dict.fromkeys(others))}
    found = []
    for name in number:
        mine = [row for row in rows if row["setting"] == name]
        points = sorted((row[x_name], row["attainment"]) for row in mine)
        if points:
            found.append(Series(name, points, number[name]))
    return found


def ttft_charts(
    portraits: Mapping[Setting, Measurement], objectives_s: Mapping[str, float], rate_rps: float
) -> list[LineChart]:
    """Draw the distribution of TTFT of each class, relative to its objective."""
    number = colours(list(portraits))
    charts = []
    for name, objective_s in objectives_s.items():
        series = []
        for setting, measured in portraits.items():
            ratios = [ttft_s / objective_s for ttft_s in measured.ttft_s.get(name, ())]
            if ratios:
                points = [one for one in cumulative(ratios) if one[0] <= TTFT_RANGE[1]]
                series.append(Series(str(setting), points, number[str(setting)]))
        if series:
            charts.append(
                LineChart(
                    f"ttft-{_plain(name)}",
                    f"TTFT of class {name or 'all'} (objective {objective_s:g} s), "
                    f"{rate_rps:.2f} requests/s",
                    "TTFT / objective",
                    "share of requests",
                    series,
                    is_log=True,
                    x_range=TTFT_RANGE,
                    y_range=(0.0, 1.0),
                )
            )
    return charts


def blocking_chart(portraits: Mapping[Setting, Measurement], rate_rps: float) -> LineChart:
    """Draw the distribution of blocking times."""
    number = colours(list(portraits))
    series = []
    for setting, measured in portraits.items():
        times_ms = [max(one * MS, 1e-2) for one in measured.blocking_s]
        if times_ms:
            series.append(Series(str(setting), cumulative(times_ms), number[str(setting)]))
    most = max((one.points[-1][0] for one in series), default=1.0)
    return LineChart(
        "blocking", f"Blocking time: dispatch to first segment, {rate_rps:.2f} requests/s",
        "milliseconds", "share of waits", series,
        is_log=True, x_range=(0.01, max(most, 1.0)), y_range=(0.0, 1.0),
    )  # fmt: skip


def timeline_chart(
    portraits: Mapping[Setting, Measurement], requests: Sequence[TraceRequest]
) -> Timeline:
    """Draw which class's prefills the device executed, a row per setting, where it is busiest."""
    groups = list(dict.fromkeys(one.service_class for one in requests)) or [""]
    begin_s = _busiest_s(requests)
    rows = []
    for setting, measured in portraits.items():
        blocks = []
        for one in measured.stretches:
            is_shown = one.end_s > begin_s and one.begin_s < begin_s + EXCERPT_S
            if is_shown and 0 <= one.number < len(requests):
                group = groups.index(requests[one.number].service_class)
                blocks.append(Block(one.begin_s - begin_s, one.end_s - begin_s, group))
        rows.append((str(setting), blocks))
    return Timeline(
        "timeline", f"What the device executed, {EXCERPT_S:g} s of the same requests", "seconds",
        rows, [name or "all" for name in groups], (0.0, EXCERPT_S),
    )  # fmt: skip


def _busiest_s(requests: Sequence[TraceRequest]) -> float:
    """Return when the excerpt with the most long prompts begins: there preemption shows."""
    times_s = [one.at_s for one in requests]
    first_s = times_s[0]
    best = max(
        range(len(requests)),
        key=lambda n: (requests[n].prompt_tokens, -n) if times_s[n] < times_s[-1] - EXCERPT_S
        else (0, -n),
    )  # fmt: skip
    return max(times_s[best] - first_s - 1.0, 0.0)


def preemption_rows(portraits: Mapping[Setting, Measurement]) -> list[Row]:
    """Return a table of blocking and preemptions."""
    return [
        {
            "setting": str(setting),
            "attainment": one.attainment,
            "preemptions": one.preemptions / one.requests,
            "blocking_mean_s": one.blocking_mean_s,
            "blocking_p99_s": one.blocking_p99_s,
            "blocking_max_s": max(one.blocking_s, default=0.0),
        }
        for setting, one in portraits.items()
    ]


PREEMPTION_COLUMNS = {
    "setting": "setting",
    "attainment": "on time %",
    "preemptions": "preemptions per request",
    "blocking_mean_s": "blocking mean ms",
    "blocking_p99_s": "p99 ms",
    "blocking_max_s": "max ms",
}


def _plain(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower()) or "all"
