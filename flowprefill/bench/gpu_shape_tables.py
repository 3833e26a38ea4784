"""The tables that `bench gpu --shape` prints when it ends, and the picture of its report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flowprefill.bench.report import Row

TABLES: dict[str, tuple[str, dict[str, str]]] = {
    "prefill": (
        "Prefill of one prompt",
        {
            "weights": "weights",
            "tokens": "tokens", "granularity": "granularity", "launch": "launch",
            "segments": "segments", "tokens_per_s": "tokens/s", "min": "min", "max": "max",
            "tflops_per_s": "TFLOP/s",
        },
    ),
    "blocking": (
        "Short prompts during a long one",
        {
            "weights": "weights",
            "granularity": "granularity", "run_ahead": "run-ahead", "launches_late": "late launch",
            "blocking_p50_s": "blocking p50 ms", "blocking_p99_s": "p99 ms",
            "blocking_max_s": "max ms", "segment_max_s": "longest segment ms",
            "gap_p50_s": "gap p50 ms", "gap_share": "gaps %", "of_none": "speed of none %",
            "blocked": "samples",
        },
    ),
    "long_blocking": (
        "Short prompts during the longest one",
        {
            "weights": "weights", "granularity": "granularity", "long_tokens": "long tokens",
            "blocking_p50_s": "blocking p50 ms", "blocking_p99_s": "p99 ms",
            "blocking_max_s": "max ms", "segment_p99_s": "segment p99 ms",
            "segment_max_s": "max ms ", "blocked": "samples",
        },
    ),
    "cost": (
        "What cutting a prefill costs",
        {
            "weights": "weights", "tokens": "tokens", "granularity": "granularity",
            "segments": "segments", "seconds": "ms", "of_none": "speed of none %",
            "of_none_p25": "p25 %", "of_none_p75": "p75 %", "rounds": "rounds",
        },
    ),
    "hol": (
        "A short prompt's time to its token during the longest one",
        {
            "weights": "weights",
            "granularity": "granularity", "long_tokens": "long tokens",
            "short_alone_p50_s": "alone p50 ms", "short_beside_p50_s": "during p50 ms",
            "short_beside_max_s": "max ms", "long_alone_s": "long alone ms", "shorts": "samples",
        },
    ),
    "decode": (
        "Decode steps",
        {
            "weights": "weights",
            "batch": "sequences", "context": "context", "granularity": "granularity",
            "tokens_per_s": "tokens/s", "step_p50_s": "step p50 ms",
            "weight_gbytes_per_s": "weights GB/s", "segments": "segments",
            "busy_s": "of it on the GPU ms", "gap_s": "between segments ms",
        },
    ),
    "operators": (
        "Operators in a prefill, of one layer",
        {
            "weights": "weights", "operator": "operator", "tokens": "tokens", "us": "µs",
            "tflops_per_s": "TFLOP/s",
        },
    ),
    "torch": (
        "torch's libraries",
        {
            "weights": "weights", "operator": "operator", "tokens": "tokens", "us": "µs",
            "tflops_per_s": "TFLOP/s", "failure": "failure",
        },
    ),
    "transformers": (
        "transformers, in turns with flowprefill",
        {
            "how": "how", "kind": "kind", "tokens": "tokens", "sequences": "sequences",
            "tokens_per_s": "tokens/s", "min": "min", "max": "max", "first_s": "first ms",
            "flowprefill_tokens_per_s": "flowprefill tokens/s",
            "flowprefill_faster": "flowprefill is x times as fast", "failure": "failure",
        },
    ),
}  # fmt: skip
BLUE, RED, ORANGE, GREEN = "#0072B2", "#D55E00", "#E69F00", "#009E73"


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw what a report has of prefill, blocking and decode, side by side.

    Args:
        path: a .png or .svg file to write.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6))
    _draw_prefill(axes[0], report["rows"])
    _draw_blocking(axes[1], report["rows"])
    _draw_decode(axes[2], report["rows"])
    figure.suptitle(f"{report['settings']['shape']} on {report['gpu']['name']}")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _of(rows: list[Row], table: str, **fields: Any) -> list[Row]:
    wanted = {"table": table} | fields
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def _of_peer(rows: list[Row], kind: str) -> list[Row]:
    """Return what was measured of it without compilation."""
    found = _of(rows, "transformers", how="sdpa", kind=kind)
    return [row for row in found if "failure" not in row]


def _draw_prefill(axes: Any, rows: list[Row]) -> None:
    """Tokens per second by length: cut, in one segment, and by transformers."""
    usual = {"granularity": "budget:0.5", "launch": "graph"}
    lines = {
        "budget of 0.5 ms": _of(rows, "prefill", weights="bf16", **usual),
        "fp8, budget of 0.5 ms": _of(rows, "prefill", weights="fp8", **usual),
        "in one segment": _of(rows, "prefill", weights="bf16", granularity="none"),
        "transformers": _of_peer(rows, "prefill"),
    }
    for (name, of_line), color in zip(lines.items(), (BLUE, RED, ORANGE, GREEN), strict=True):
        found = sorted(of_line, key=lambda row: row["tokens"])
        if found:
            xs, ys = ([row[key] for row in found] for key in ("tokens", "tokens_per_s"))
            axes.plot(xs, ys, "o-", color=color, label=name)
            axes.set_xscale("log", base=2)
            axes.legend(fontsize=8)
    axes.set(title="prefill", xlabel="tokens", ylabel="tokens/s", ylim=(0, None))


def _draw_blocking(axes: Any, rows: list[Row]) -> None:
    """Blocking by granularity and run-ahead: median and the longest 1 %; of what came first."""
    measured = [row["weights"] for row in rows if row["table"] == "blocking"]
    for depth, color in ((1, BLUE), (2, ORANGE)):
        found = _of(rows, "blocking", run_ahead=depth, weights=next(iter(measured), ""))
        names = [row["granularity"] for row in found]
        for key, marker in (("blocking_p50_s", "o"), ("blocking_p99_s", "^")):
            values = [1e3 * row[key] if row[key] else float("nan") for row in found]
            label = f"run-ahead {depth}, {key[9:12]}"
            if names:
                axes.plot(names, values, marker, color=color, label=label)
                axes.set_yscale("log")
                axes.legend(fontsize=8)
    axes.set(title="blocking of a short prompt", ylabel="ms")
    axes.tick_params(axis="x", rotation=30)


def _draw_decode(axes: Any, rows: list[Row]) -> None:
    """Tokens per second by batch, side by side."""
    cut = [row for row in rows if row.get("granularity") != "none"]
    found = {
        name: {row["batch"]: row["tokens_per_s"] for row in _of(cut, "decode", weights=name)}
        for name in ("bf16", "fp8")
    }
    peers = {row["sequences"]: row["tokens_per_s"] for row in _of_peer(rows, "decode")}
    found["transformers"] = peers
    colors = {"bf16": BLUE, "fp8": RED, "transformers": GREEN}
    found = {name: of_one for name, of_one in found.items() if of_one}
    batches = sorted(set().union(*found.values()))
    width = 0.8 / max(len(found), 1)
    for i, (name, of_one) in enumerate(found.items()):
        places = [batches.index(batch) + i * width for batch in of_one]
        axes.bar(places, list(of_one.values()), width, color=colors[name], label=name)
        axes.set_xticks(range(len(batches)), [str(batch) for batch in batches])
        axes.legend(fontsize=8)
    axes.set(title="decode", xlabel="sequences", ylabel="tokens/s")
