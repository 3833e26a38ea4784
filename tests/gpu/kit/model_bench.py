"""FlowPrefill on random weights of Llama-3.1-8B's shape, on one GPU: no file, no download.

run.sh's stage "model":  model_bench.py OUT.json BUDGET_S [--layers N] [--parts ...]
Every row is printed as soon as it is known, and the JSON is written anew after each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from flowprefill.bench import gpu as bench
from flowprefill.bench.gpu_model import GpuModel, load_weights
from flowprefill.bench.prefill import flops_of
from flowprefill.config import Granularity
from flowprefill.engine.cuda_device import cublas_lt_libraries
from flowprefill.engine.device_choice import DeviceChoice, choose_device
from flowprefill.engine.loading import model_shape, plan_options
from flowprefill.models.families import build_graph
from flowprefill.models.model_config import ModelConfig
from flowprefill.scheduling.cost_model import CostModel, MachineRates

PARTS = ("prefill", "operators", "make_run", "run_ahead", "eager")
GRANULARITIES = ("none", "budget:2", "layer", "operator")
LONG = 8192  # tokens; beyond it fewer granularities and fewer rounds
EAGER_TOKENS = (128, 512, 2048)
MEASURES_GEMMS = True  # takes minutes on the double of the CUDA runtime
START_S = time.monotonic()


def llama_8b(layers: int) -> ModelConfig:
    """Return the configuration of Llama-3.1-8B, or of its first layers."""
    return ModelConfig(
        family="llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336,
        num_layers=layers, num_heads=32, num_kv_heads=8, head_dim=128, rms_eps=1e-5,
        rope_theta=500000.0, max_position=131072,
    )  # fmt: skip


class RandomCheckpoint:
    """What fill_model() reads: one random row of numbers, cut to each tensor's shape."""

    def __init__(self, config: ModelConfig) -> None:
        self.name = "random-llama-8b"
        self.config = config
        self.graph = build_graph(config)
        self._shapes = self.graph.sources()
        most = max(int(np.prod(shape)) for shape in self._shapes.values())
        piece = torch.randn(1 << 22, generator=torch.Generator().manual_seed(1)) * 0.02
        self._numbers = piece.repeat(-(-most // piece.numel()))

    def weights(self, progress: Any = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield each weight; norms are ones."""
        for name, shape in self._shapes.items():
            numbers = self._numbers[: int(np.prod(shape))].reshape(shape)
            yield name, torch.ones(shape) if len(shape) == 1 else numbers


class ModelBench:
    """The loaded weights, what was measured of them so far, and the time that is left."""

    def __init__(self, choice: DeviceChoice, args: argparse.Namespace) -> None:
        """Load the weights."""
        self._args = args
        self._choice = choice
        self._cuda: Any = choice.module
        self._checkpoint: Any = RandomCheckpoint(llama_8b(args.layers))
        self._shape = model_shape(self._checkpoint.graph, "bf16")
        self._rates = MachineRates()
        self.report: dict[str, Any] = {
            "layers": args.layers, "gpu": self._cuda.device_info(choice.index), "rows": [],
        }  # fmt: skip
        since_s = time.monotonic()
        self._weights = load_weights(choice, self._checkpoint)
        self.keep(table="load", seconds=round(time.monotonic() - since_s, 2))

    def keep(self, **row: Any) -> None:
        """Print a row and write the report."""
        self.report["rows"].append(row)
        print(f"[{time.monotonic() - START_S:6.1f} s]", json.dumps(row, default=str), flush=True)
        self._args.json.write_text(json.dumps(self.report, indent=1, default=str))

    def _has(self, seconds: float) -> bool:
        return self._args.budget_s - (time.monotonic() - START_S) > seconds

    @contextmanager
    def _model(self, **options: Any) -> Iterator[GpuModel]:
        since_s = time.monotonic()
        longest = max(self._args.tokens)
        model = GpuModel(self._choice, self._checkpoint, self._weights, longest, options)
        self.keep(table="start", seconds=round(time.monotonic() - since_s, 2), **options)
        try:
            yield model
        finally:
            model.close()

    def _plan(self, granularity: str) -> Any:
        return plan_options(self._cuda, Granularity.parse(granularity), self._rates)

    def measure(self) -> None:
        """Measure the parts that are asked for, in order of value, while there is time."""
        with tempfile.TemporaryDirectory() as folder:
            common = {
                "measures_gemms": MEASURES_GEMMS,
                "gemm_cache_path": str(Path(folder) / "gemm-choices"),
                "cublas_lt_libraries": cublas_lt_libraries(self._cuda, self._choice.index),
            }
            with self._model(**common) as model:
                self._measure_usual(model)
            for depth in (1, 3) if "run_ahead" in self._args.parts else ():
                if self._has(30):
                    with self._model(**common, run_ahead=depth) as model:
                        self._run_ahead(model, depth)
            if "eager" in self._args.parts and self._has(30):
                with self._model(**common, has_graphs=False) as model:
                    for tokens in EAGER_TOKENS:
                        self._prefill(model, tokens, "budget:2", "eager")

    def _measure_usual(self, model: GpuModel) -> None:
        self.report["gemm"] = bench.gemm_rows(model)
        self.report["memory"] = model.memory()
        self._rates = rates = model.rates()
        self.keep(
            table="rates",
            gemm_tflops=rates.gemm_flops_per_s / 1e12,
            attention_tflops=rates.attention_flops_per_s / 1e12,
            weight_gbytes=rates.weight_bytes_per_s / 1e9,
        )
        parts: dict[str, Any] = {
            "prefill": self._prefills, "operators": self._operators, "make_run": self._make_run,
        }  # fmt: skip
        for name, measure in parts.items():
            for tokens in self._args.tokens if name in self._args.parts else ():
                if self._has(20):
                    measure(model, tokens)
        self.report["graphs"] = model.graph_report()
        if "run_ahead" in self._args.parts and self._has(20):
            self._run_ahead(model, bench.USUAL_DEPTH)

    def _prefills(self, model: GpuModel, tokens: int) -> None:
        for granularity in GRANULARITIES[: 2 if tokens > LONG else None]:
            if self._has(15):
                self._prefill(model, tokens, granularity, "graph")

    def _prefill(self, model: GpuModel, tokens: int, granularity: str, launch: str) -> None:
        plan = self._plan(granularity)
        for _ in range(1 if tokens > LONG else 3):  # graphs are captured at a second launch
            model.prefill_s(tokens, plan)
        took_s = [model.prefill_s(tokens, plan) for _ in range(3 if tokens > LONG else 5)]
        median_s = statistics.median(took_s)
        self.keep(
            table="prefill",
            launch=launch,
            tokens=tokens,
            granularity=granularity,
            segments=model.make(tokens, plan).num_segments,
            ms=median_s * 1e3,
            spread_ms=(max(took_s) - min(took_s)) * 1e3,
            predicted_ms=CostModel(self._shape, self._rates).prefill_s(tokens) * 1e3,
            tokens_per_s=tokens / median_s,
            tflops=flops_of(tokens, self._shape) / median_s / 1e12,
        )

    def _operators(self, model: GpuModel, tokens: int) -> None:
        """Sum the segments' times by operator, and what the GPU did nothing between them."""
        plan = self._plan("operator")
        model.prefill_s(tokens, plan)
        labels = model.make(tokens, plan).labels()
        with model.recorded() as segments:
            model.prefill_s(tokens, plan)
        spent_s: dict[str, float] = defaultdict(float)
        for segment in segments:
            spent_s[labels[segment.index].op] += segment.end_s - segment.start_s
        self.keep(
            table="operators",
            tokens=tokens,
            ms={name: round(s * 1e3, 3) for name, s in spent_s.items()},
            gaps_ms=sum(bench.gaps_of(segments)) * 1e3,
        )

    def _make_run(self, model: GpuModel, tokens: int) -> None:
        """Measure how long making a run costs the engine's thread."""
        plan, took_s = self._plan("budget:2"), []
        for _ in range(5):
            since_s = time.perf_counter()
            model.make(tokens, plan)
            took_s.append(time.perf_counter() - since_s)
        self.keep(table="make_run", tokens=tokens, ms=statistics.median(took_s) * 1e3)

    def _run_ahead(self, model: GpuModel, depth: int) -> None:
        tokens = [min(LONG, max(self._args.tokens))]
        args: Any = SimpleNamespace(tokens=tokens, short_tokens=64, shorts=30, rounds=2, seed=1)
        self.keep(**bench.run_ahead_row(depth, model, self._plan("budget:2"), args))


def main() -> int:
    """Measure, or say why there is no GPU."""
    parser = argparse.ArgumentParser()
    parser.add_argument("json", type=Path)
    parser.add_argument("budget_s", type=float)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 8192, 32768])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    args = parser.parse_args()
    choice = choose_device("auto")
    if choice.module is None:
        print(f"no GPU: {choice.reason}")
        return 77
    ModelBench(choice, args).measure()
    return 0


if __name__ == "__main__":
    sys.exit(main())
