"""`flowprefill bench gpu`: what one GPU does; `make bench-gpu` writes the report to send us.

Rows of four tables, told apart by their key `table`:

- `gemm`: the matrix kernels measured for each shape of product, and which was chosen;
- `prefill`: tokens per second by prompt length, from dispatch to result, with graphs and without;
- `run_ahead`: by how many segments the host may be ahead of the GPU: the gaps between launches that
  this hides, and the blocking time that it costs, from the dispatch of a short prompt during a long
  one to its first segment. Times are the GPU's own, by events;
- `hol`: short prompts during a long one through the whole engine, see `bench hol`.

With `--shape` another set of tables, see gpu_shape.py.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flowprefill.bench import gpu_shape, gpu_shape_tables, hol
from flowprefill.bench.common import (
    add_common_arguments,
    check_common,
    check_least,
    check_lengths,
    load_engine,
    say,
)
from flowprefill.bench.gpu_model import GpuModel, gaps_of, load_weights, shorts_beside
from flowprefill.bench.prefill import flops_of
from flowprefill.bench.random_model import SHAPES
from flowprefill.bench.report import Report, Row, print_table
from flowprefill.bench.statistics import median, quantiles
from flowprefill.config import EngineConfig, Granularity
from flowprefill.engine.cuda_device import CudaDevice, cublas_lt_libraries
from flowprefill.engine.device_choice import DeviceChoice, choose_device
from flowprefill.engine.loading import model_shape, plan_options
from flowprefill.errors import CheckpointError, ConfigError
from flowprefill.models.checkpoint import Checkpoint, open_checkpoint
from flowprefill.scheduling.cost_model import MachineRates, ModelShape

TABLES = ("gemm", "prefill", "run_ahead", "hol")
LENGTHS = (128, 512, 2048, 7500)
QUICK_LENGTHS = (64, 256)
DEPTHS = (1, 2, 3, 4)
USUAL_DEPTH = 1
HOL_GRANULARITIES = ("none", "operator", "budget:2")
SPAN = 0.85  # of the long prompt's time, within which a short one arrives
SHARES = (0.5, 0.99, 1)
COLUMNS = {
    "gemm": {
        "shape": "rows x columns x depth", "kind": "output", "chosen": "chosen", "us": "µs",
        "tflops_per_s": "TFLOP/s", "others": "others, µs",
    },
    "prefill": {
        "launch": "launch", "tokens": "tokens", "tokens_per_s": "tokens/s", "min": "min",
        "max": "max", "tflops_per_s": "TFLOP/s", "samples": "samples",
    },
    "run_ahead": {
        "run_ahead": "run-ahead", "blocking_p50_s": "blocking p50 ms",
        "blocking_p99_s": "p99 ms", "blocking_max_s": "max ms", "segment_p50_s": "segment p50 ms",
        "segment_max_s": "max ms ", "gap_p50_s": "gap p50 ms", "gap_p99_s": "p99 ms ",
        "gap_share": "gaps %", "blocked": "samples",
    },
    "hol": hol.COLUMNS,
}  # fmt: skip
TITLES = {
    "gemm": "Matrix kernels",
    "prefill": "Prefill",
    "run_ahead": "Segments that the host is ahead",
    "hol": "Short prompts during a long one",
}

# Makes a model with these options for the length of a `with`.
OpenModel = Callable[..., Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``flowprefill bench gpu``."""
    add_common_arguments(parser, rounds=3)
    parser.set_defaults(device="cuda")
    parser.add_argument(
        "--only", nargs="+", choices=TABLES, default=list(TABLES), metavar="TABLE",
        help=f"of {', '.join(TABLES)}; default all",
    )  # fmt: skip
    parser.add_argument(
        "--tokens", type=int, nargs="+", metavar="N",
        help=f"prompt lengths, default {' '.join(map(str, LENGTHS))}; the last is the long one",
    )  # fmt: skip
    parser.add_argument("--short-tokens", type=int, default=64, help="default 64")
    parser.add_argument(
        "--shorts", type=int, default=40, help="short prompts per measurement, default 40"
    )
    parser.add_argument("--granularity", default="budget:2", help="of prefill and run_ahead")
    shape = parser.add_argument_group(
        "random weights instead of a model, other tables: in order of value, while there is time"
    )
    shape.add_argument("--shape", choices=sorted(SHAPES), help="nothing is downloaded")
    shape.add_argument("--layers", type=int, default=0, help="of it, default all")
    shape.add_argument("--limit-s", type=float, default=250, help="seconds, default 250")
    shape.add_argument(
        "--parts", nargs="+", choices=gpu_shape.PARTS, default=list(gpu_shape.PARTS),
        metavar="PART", help=f"of {', '.join(gpu_shape.PARTS)}; default all",
    )  # fmt: skip
    shape.add_argument("--peer", choices=["transformers"], help="measure it on the same card too")
    shape.add_argument("--peer-s", type=float, default=60, help="seconds of it, default 60")
    shape.add_argument(
        "--weights", nargs="+", choices=("bf16", "fp8"), default=["bf16"],
        help="one after the other, --limit-s for each; fp8: from compute capability 8.9 on; "
        "default bf16",
    )  # fmt: skip
    shape.add_argument("--picture", type=Path, help="a .png or .svg file to draw")


def run(args: argparse.Namespace) -> int:
    """Measure, print the tables, write the JSON.

    Raises:
        ConfigError: there is no GPU that can be used; says why. Nothing has been loaded then.
    """
    choice = _choose_gpu(args.device)
    check_common(args)
    if args.shape:
        return _run_shape(choice, args)
    check_least("shorts", args.shorts, 1)
    check_least("short-tokens", args.short_tokens, 1)
    Granularity.parse(args.granularity)
    args.tokens = args.tokens or list(QUICK_LENGTHS if args.quick else LENGTHS)
    check_least("tokens", min(args.tokens), 1)
    if args.quick:
        args.rounds, args.shorts = 1, min(args.shorts, hol.QUICK_SHORTS)
    names = "model quantization rounds seed tokens short_tokens shorts granularity only"
    report = Report("gpu", {name: getattr(args, name) for name in names.split()})
    report.extra["gpu"] = {"device": choice.name, **_device_info(choice)}
    measure(report, choice, args)
    for table in args.only:
        rows = [row for row in report.rows if row["table"] == table]
        print_table(f"{TITLES[table]}, {report.extra['gpu']['name']}", rows, COLUMNS[table])
    report.write(args.json)
    return 0


def _run_shape(choice: DeviceChoice, args: argparse.Namespace) -> int:
    args.tokens = args.tokens or list(gpu_shape.LENGTHS)
    check_least("tokens", min(args.tokens), 1)
    check_least("layers", args.layers, 0)
    check_least("limit-s", args.limit_s, 1)
    check_least("peer-s", args.peer_s, 1)
    longest = SHAPES[args.shape]().max_position
    if max(args.tokens) > longest:
        raise ConfigError(
            f"tokens: got {max(args.tokens)}, expected at most {longest}", param="tokens"
        )
    if args.quantization != "auto":
        raise ConfigError(
            f"quantization: got {args.quantization!r}, expected --weights instead with --shape",
            param="quantization",
        )
    if "fp8" in args.weights:
        _device_of(choice, "fp8")
    names = ("shape", "layers", "seed", "tokens", "limit_s", "parts", "peer", "peer_s", "weights")
    report = Report("gpu", {name: getattr(args, name) for name in names})
    report.extra["gpu"] = {"device": choice.name, **_device_info(choice)}
    with _named_errors(choice):
        for weights in args.weights:
            gpu_shape.ShapeBench(report, choice, args, weights).measure()
    for table, (title, columns) in gpu_shape_tables.TABLES.items():
        rows = [row for row in report.rows if row["table"] == table]
        if rows:
            print_table(f"{title}, {report.extra['gpu']['name']}", rows, columns)
    report.write(args.json)
    if args.picture is not None:
        try:
            gpu_shape_tables.draw(report.to_dict(), args.picture)
        except ImportError as error:
            say(f"no picture: {error} (pip install matplotlib)")
    return 0


def _choose_gpu(device: str) -> DeviceChoice:
    EngineConfig(device=device)  # refuses what no setting allows
    choice = choose_device(device)
    if choice.module is None:
        raise ConfigError(f"device: got {device!r}, expected a GPU: cuda or cuda:N", param="device")
    return choice


def _device_of(choice: DeviceChoice, quantization: str) -> CudaDevice:
    """Return the GPU as the engine has it; ConfigError if it does not compute that."""
    return CudaDevice(EngineConfig(quantization=quantization), choice.module, choice.index, "")


def _device_info(choice: DeviceChoice) -> dict[str, Any]:
    info: dict[str, Any] = choice.module.device_info(choice.index)  # type: ignore[union-attr]
    return info | {"compute_capability": ".".join(map(str, info["compute_capability"]))}


# ---- measuring -----------------------------------------------------------------------------------


def measure(report: Report, choice: DeviceChoice, args: argparse.Namespace) -> None:
    """Fill the report's rows and `extra`, table by table.

    The model is loaded once for all tables but the last, and once by the engine.
    """
    if set(args.only) - {"hol"}:
        _measure_models(report, choice, args)
    if "hol" in args.only:
        report.rows += _measure_hol(report, args)


def _measure_models(report: Report, choice: DeviceChoice, args: argparse.Namespace) -> None:
    device = _device_of(choice, args.quantization)
    checkpoint = open_checkpoint(args.model)
    longest = max(*args.tokens, args.short_tokens)
    if longest > checkpoint.config.max_position:
        raise ConfigError(
            f"tokens: got {longest}, expected at most {checkpoint.config.max_position}",
            param="tokens",
        )
    with tempfile.TemporaryDirectory() as folder:
        common = {
            "measures_gemms": "gemm" in args.only,
            "measures_cublas_lt": "gemm" in args.only,
            "gemm_cache_path": str(Path(folder) / "gemm-choices"),  # measured by the first
            "cublas_lt_libraries": cublas_lt_libraries(choice.module, choice.index),
        }
        open_model = _opener(choice, device, checkpoint, longest, common)
        shape = model_shape(checkpoint.graph, "bf16", device.quantization)
        plan = _measure_usual(report, open_model, args, shape)
        if "prefill" in args.only:
            with open_model(has_graphs=False) as model:
                report.rows += prefill_rows("eager", model, plan, args, shape)
        if "run_ahead" in args.only:
            for depth in DEPTHS:
                with open_model(run_ahead=depth) as model:
                    report.rows.append(run_ahead_row(depth, model, plan, args))


def _opener(
    choice: DeviceChoice, device: CudaDevice, checkpoint: Checkpoint, longest: int,
    common: dict[str, Any],
) -> OpenModel:  # fmt: skip
    """Load the weights; returns what makes models of them."""
    say(f"loading {checkpoint.name}")
    with _named_errors(choice):
        numbers = device.quantization
        weights = load_weights(choice, checkpoint, device.block_formats(checkpoint), numbers)

    @contextmanager
    def open_model(**options: Any) -> Iterator[GpuModel]:
        say(", ".join(f"{name} {value}" for name, value in options.items()))
        with _named_errors(choice):
            model = GpuModel(
                choice, checkpoint, weights, longest, common | options, quantization=numbers
            )
        try:
            yield model
        finally:
            model.close()

    return open_model


@contextmanager
def _named_errors(choice: DeviceChoice) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise CheckpointError(f"{choice.name}: {error}") from None
    except RuntimeError as error:
        raise ConfigError(f"{choice.name}: {error}", param="device") from None


def _measure_usual(
    report: Report, open_model: OpenModel, args: argparse.Namespace, shape: ModelShape
) -> Any:
    """Measure what needs the model as the engine has it; returns the plan for the other tables."""
    with open_model(run_ahead=USUAL_DEPTH) as model:
        if "gemm" in args.only:
            report.rows += gemm_rows(model)
            rates_found = [row["tflops_per_s"] for row in report.rows if row["us"] is not None]
            report.extra["peak_gemm_flops_per_s"] = max(rates_found, default=0.0) * 1e12
        rates: MachineRates = model.rates()
        plan = plan_options(model.cuda, Granularity.parse(args.granularity), rates)
        report.extra["planner_rates"] = {
            "gemm_flops_per_s": rates.gemm_flops_per_s,
            "attention_flops_per_s": rates.attention_flops_per_s,
            "weight_bytes_per_s": rates.weight_bytes_per_s,
        }
        if "prefill" in args.only:
            report.rows += prefill_rows("graph", model, plan, args, shape)
        report.extra["graphs"] = model.graph_report()
        report.extra["memory"] = model.memory()
    return plan


def gemm_rows(model: GpuModel) -> list[Row]:
    """Return one row for each shape of product; times that are texts say why there is none."""
    out = []
    for rows, columns, depth, kind, chosen, timings in model.gemm_report():
        chosen_us = timings.get(chosen)
        us = chosen_us if isinstance(chosen_us, float) and chosen_us > 0 else None
        others = (
            f"{name} {value:.1f}" if isinstance(value, float) else f"{name}: {value}"
            for name, value in timings.items()
            if name != chosen
        )
        out.append(
            {
                "table": "gemm",
                "shape": f"{rows} x {columns} x {depth}",
                "rows": rows,
                "columns": columns,
                "depth": depth,
                "kind": kind,
                "chosen": chosen,
                "us": us,
                "tflops_per_s": 2e-6 * rows * columns * depth / us if us else None,
                "others": ", ".join(others),
                "timings_us": timings,
            }
        )
    return out


def prefill_rows(
    launch: str,
    model: GpuModel,
    plan: Any,
    args: argparse.Namespace,
    shape: ModelShape,
) -> list[Row]:
    """Measure every length; the first three of each are not counted: they capture graphs."""
    out = []
    for tokens in args.tokens:
        for _ in range(3):
            model.prefill_s(tokens, plan)
        took = [model.prefill_s(tokens, plan) for _ in range(3 * args.rounds)]
        say(f"{launch:<6} {tokens:6} tokens  {median(took) * 1e3:8.2f} ms")
        out.append(
            {
                "table": "prefill",
                "launch": launch,
                "tokens": tokens,
                "tokens_per_s": tokens / median(took),
                "min": tokens / max(took),
                "max": tokens / min(took),
                "tflops_per_s": flops_of(tokens, shape) / median(took) / 1e12,
                "samples": len(took),
            }
        )
    return out


def run_ahead_row(depth: int, model: GpuModel, plan: Any, args: argparse.Namespace) -> Row:
    """Measure gaps between the segments of a long prompt, and how long it blocks short ones."""
    long_tokens = args.tokens[-1]
    for _ in range(3):
        model.prefill_s(args.short_tokens, plan)
        model.prefill_s(long_tokens, plan)
    with model.recorded() as segments:
        took_s = [model.prefill_s(long_tokens, plan) for _ in range(args.rounds)]
    gaps = gaps_of(segments)
    rng = random.Random(args.seed)
    blocking = []
    for _ in range(args.shorts):
        delays_s = [rng.uniform(0.0, SPAN * median(took_s))]
        tokens = (long_tokens, args.short_tokens)
        blocking += [waited_s for waited_s, _ in shorts_beside(model, plan, tokens, delays_s)]
    lengths = [segment.end_s - segment.start_s for segment in segments]
    told = f"{median(blocking) * 1e3:.3f} ms" if blocking else "not met"
    say(f"run-ahead {depth}  blocking {told}")
    return {
        "table": "run_ahead",
        "run_ahead": depth,
        **quantiles("blocking", blocking, SHARES),
        **quantiles("segment", lengths, SHARES),
        **quantiles("gap", gaps, SHARES),
        "gap_share": sum(gaps) / (sum(gaps) + sum(lengths)) if segments else None,
        "segments": len(segments) // args.rounds,
        "blocked": len(blocking),
    }


def _measure_hol(report: Report, args: argparse.Namespace) -> list[Row]:
    args.long_tokens, args.short_ttft_ms = args.tokens[-1], 0.0
    with load_engine(args) as engine:
        check_lengths(engine, [args.long_tokens, args.short_tokens])
        report.settings["engine"] = engine.describe()
        rounds = hol.measure(engine, args, HOL_GRANULARITIES)
    return [{"table": "hol", **hol.row_of(name, rounds)} for name in HOL_GRANULARITIES]
