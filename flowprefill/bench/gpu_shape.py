"""`bench gpu --shape`: random weights of a known model's shape on one GPU: no file, no download.

Long because each part is a few lines on one loaded model. They come in order of value, each while
there is time; every row is printed as soon as it is known, and the JSON is written anew after it.
Rows are told apart by their key `table`:

- `prefill`: tokens per second of one prompt, from dispatch to result, by length and granularity;
  `of_none`: against the same prompt in one segment, so 1 less it is the cost of being preemptible;
- `decode`: tokens per second of a batch of sequences, tokens chosen on the device, with cuts and in
  one segment;
- `operators`: time and rate of each operator in a prefill;
- `blocking`: by granularity and run-ahead, from the dispatch of a short prompt during a long one to
  its first segment, and the gaps in which the GPU waits for a launch, by the GPU's own clock;
  `at_once`: the same where the next segment is launched as soon as one begins, not shortly before
  it ends;
- `long_blocking`: the same waiting during one prefill of the longest prompt, beyond LONG tokens;
- `cost`: what cutting costs, prefills of all granularities in turns (gpu_cost.py);
- `hol`: the same short prompt's time to its token, during the longest prompt and alone;
- `torch`: cuBLAS and attention of it, of the same sizes;
- `transformers` (`--peer transformers`): prefill and decode by that library on the same card, in
  turns with ours, see gpu_peer.py.

With `--weights fp8` those of layers are e4m3. `operators` then has products with what is
around them: rows are rounded before, some are scaled after. `torch` has its products of e4m3 with a
scale for each row and column, of operands that are rounded already, and those of bf16. Both are
measured one after the other with `--weights bf16 fp8`; rows say which they are of.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch

from flowprefill.bench import gpu_peer, gpu_torch
from flowprefill.bench.common import say
from flowprefill.bench.gpu_cost import cost_rows
from flowprefill.bench.gpu_model import GpuModel, gaps_of, load_weights, shorts_beside
from flowprefill.bench.prefill import flops_of
from flowprefill.bench.random_model import SHAPES, RandomCheckpoint
from flowprefill.bench.report import Report
from flowprefill.bench.statistics import median, quantiles
from flowprefill.config import Granularity
from flowprefill.engine.cuda_device import cublas_lt_libraries
from flowprefill.engine.device_choice import DeviceChoice
from flowprefill.engine.loading import model_shape, plan_options
from flowprefill.scheduling.cost_model import CostModel, MachineRates, attention_pairs

PARTS = (
    "prefill", "decode", "operators", "blocking", "long_blocking", "cost", "at_once", "hol",
    "torch", "preemptible", "run_ahead", "make_run", "eager", "transformers",
)  # fmt: skip
USUAL = "budget:0.5"
GRANULARITIES = ("budget:0.3", USUAL, "budget:1", "budget:2", "none")
LENGTHS = (128, 512, 2048, 8192, 32768)
LONG = 8192  # tokens of the long prompt that short ones block on; longer ones get fewer rounds
BATCHES, CONTEXT = (1, 16, 64), 1024
DECODE_STEPS = 20
SHORT_TOKENS, SHORTS, HOL_SHORTS = 64, 120, 6
SHORTS_OF_NONE = 12  # where nothing is cut, each waits for a whole prompt
TOGETHER = 8  # that come during one long prompt, where it is cut
EAGER_TOKENS = 2048  # at most
SPAN = 0.85  # of the long prompt's time, within which a short one arrives
SHARES = (0.5, 0.99, 1)
# Segments are called by their first operator; a norm rides with the product that reads it.
RIDES_WITH = {"attn_norm": "qkv_proj", "mlp_norm": "gate_up_proj"}


class ShapeBench:
    """The loaded weights, what was measured of them so far, and the time that is left."""

    def __init__(
        self, report: Report, choice: DeviceChoice, args: argparse.Namespace, weights: str
    ) -> None:
        """Load the weights.

        Args:
            args: shape, layers (0: all), tokens, parts, limit_s, peer, peer_s, seed, and json:
                where the report is written after each row, or None.
            weights: of the layers: bf16 or fp8.
        """
        self._since_s = time.monotonic()
        self._report = report
        self._choice = choice
        self._args = args
        self._form = weights
        self._quantization = "fp8" if weights == "fp8" else "none"
        self._cuda: Any = choice.module
        make = SHAPES[args.shape]
        self._config = make(args.layers) if args.layers else make()
        self._checkpoint = RandomCheckpoint(args.shape, self._config)
        self._shape = model_shape(self._checkpoint.graph, "bf16", self._quantization)
        self._rates = MachineRates()
        self._prefilled_s: dict[tuple[int, str], float] = {}
        fp8_sources = self._checkpoint.layer_matrices() if weights == "fp8" else []
        self._weights = load_weights(choice, self._checkpoint, fp8_sources)
        self._keep("load", seconds=time.monotonic() - self._since_s)

    def _keep(self, table: str, **row: Any) -> None:
        """Print a row and write the report."""
        row = {"weights": self._form} | row
        self._report.rows.append({"table": table} | row)
        shown = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
        passed_s = time.monotonic() - self._since_s
        say(f"[{passed_s:6.1f} s] {table:<12} {json.dumps(shown, default=str)}")
        self._report.write(self._args.json)

    def _left_s(self) -> float:
        return float(self._args.limit_s - time.monotonic() + self._since_s)

    def _has(self, seconds: float) -> bool:
        return self._left_s() > seconds

    def _wants(self, part: str, seconds: float) -> bool:
        return part in self._args.parts and self._has(seconds)

    @contextmanager
    def _model(self, **options: Any) -> Iterator[GpuModel]:
        common = {"cublas_lt_libraries": cublas_lt_libraries(self._cuda, self._choice.index)}
        since_s = time.monotonic()
        longest = max(*self._args.tokens, SHORT_TOKENS, *BATCHES)
        model = GpuModel(
            self._choice, self._checkpoint, self._weights, longest, common | options, max(BATCHES),
            self._quantization,
        )  # fmt: skip
        self._keep("start", seconds=time.monotonic() - since_s, **options)
        try:
            yield model
        finally:
            model.close()

    def _plan(self, granularity: str) -> Any:
        return plan_options(self._cuda, Granularity.parse(granularity), self._rates)

    # ---- the parts, in order -----------------------------------------------------------------

    def measure(self) -> None:
        """Measure the parts that are asked for, while there is time."""
        with self._model() as model:
            self._measure_usual(model)
        if self._wants("at_once", 15):
            with self._model(launches_late=False) as model:
                self._blocking(model, 1, (USUAL,), is_late=False)
        if self._wants("run_ahead", 20):
            with self._model(run_ahead=2) as model:
                self._blocking(model, 2, (USUAL,))
        if self._wants("eager", 20):
            with self._model(has_graphs=False) as model:
                for tokens in self._args.tokens:
                    if tokens <= EAGER_TOKENS and self._has(5):
                        self._prefill(model, tokens, USUAL, "eager")
        if self._form == "bf16" and self._args.peer and self._wants("transformers", 20):
            self._transformers()

    def _measure_usual(self, model: GpuModel) -> None:
        self._report.extra[self._named("memory")] = model.memory()
        self._report.extra["cublas_lt"] = model.cublas_lt()
        self._rates = rates = model.rates()
        self._keep(
            "rates",
            gemm_tflops_per_s=rates.gemm_flops_per_s / 1e12,
            attention_tflops_per_s=rates.attention_flops_per_s / 1e12,
            weight_gbytes_per_s=rates.weight_bytes_per_s / 1e9,
        )
        lengths = self._args.tokens
        for tokens in lengths if self._wants("prefill", 5) else ():
            if self._has(10):
                self._prefill(model, tokens, USUAL)
        self._graphs(model)
        for batch in BATCHES if self._wants("decode", 10) else ():
            for granularity in (USUAL, "none"):
                self._decode(model, batch, granularity)
        for tokens in lengths if self._wants("operators", 10) else ():
            if self._has(10):
                self._operators(model, tokens)
        if self._wants("blocking", 20):
            self._blocking(model, 1)
        if max(lengths) > LONG and self._wants("long_blocking", 30):
            self._long_blocking(model)
        for tokens in lengths if self._wants("cost", 10) else ():
            for row in cost_rows(model, self._plan, tokens, self._has):
                self._keep("cost", **row)
        if self._wants("hol", 20):
            self._hol(model)
        if self._wants("torch", 20):
            self._torch()
        for tokens in reversed(lengths) if self._wants("preemptible", 10) else ():
            for granularity in ("none", "budget:2", "layer", "operator"):
                if self._has(15):
                    self._prefill(model, tokens, granularity)
        for tokens in lengths if self._wants("make_run", 5) else ():
            self._make_run(model, tokens)
        self._graphs(model)

    def _named(self, key: str) -> str:
        """Return the report's key of these weights."""
        return key if self._form == "bf16" else f"{key}_{self._form}"

    def _graphs(self, model: GpuModel) -> None:
        self._report.extra[self._named("graphs")] = model.graph_report()

    def _prefill(
        self, model: GpuModel, tokens: int, granularity: str, launch: str = "graph"
    ) -> float:
        """Measure one length; returns the median seconds."""
        plan = self._plan(granularity)
        for _ in range(1 if tokens > LONG else 3):  # graphs are captured at a second launch
            model.prefill_s(tokens, plan)
        took_s = [model.prefill_s(tokens, plan) for _ in range(3 if tokens > LONG else 5)]
        median_s = median(took_s)
        if launch == "graph":
            self._prefilled_s[tokens, granularity] = median_s
        self._keep(
            "prefill",
            launch=launch,
            tokens=tokens,
            granularity=granularity,
            segments=model.make(tokens, plan).num_segments,
            tokens_per_s=tokens / median_s,
            min=tokens / max(took_s),
            max=tokens / min(took_s),
            predicted_s=CostModel(self._shape, self._rates).prefill_s(tokens),
            tflops_per_s=flops_of(tokens, self._shape) / median_s / 1e12,
        )
        return median_s

    def _prefill_s(self, model: GpuModel, tokens: int, granularity: str) -> float:
        known = self._prefilled_s.get((tokens, granularity))
        return known if known is not None else self._prefill(model, tokens, granularity)

    def _blocking(
        self,
        model: GpuModel,
        run_ahead: int,
        granularities: Sequence[str] = GRANULARITIES,
        is_late: bool = True,
    ) -> None:
        """Measure by granularity how long short prompts wait, and the gaps between launches."""
        long_tokens = min(LONG, max(self._args.tokens))
        self._prefill_s(model, long_tokens, "none")
        for granularity in granularities:
            if not self._has(10):
                return
            plan = self._plan(granularity)
            for _ in range(3):
                model.prefill_s(SHORT_TOKENS, plan)
                model.prefill_s(long_tokens, plan)
            with model.recorded() as segments:
                long_s = median(model.prefill_s(long_tokens, plan) for _ in range(3))
            found = self._shorts(model, granularity, long_tokens, long_s, SHORTS)
            waits = [wait_s for wait_s, _ in found]
            lengths = [segment.end_s - segment.start_s for segment in segments]
            gaps = gaps_of(segments)
            self._keep(
                "blocking",
                run_ahead=run_ahead,
                launches_late=is_late and run_ahead == 1,
                granularity=granularity,
                long_tokens=long_tokens,
                **quantiles("blocking", waits, SHARES),
                **quantiles("segment", lengths, SHARES),
                **quantiles("gap", gaps, SHARES),
                gap_share=sum(gaps) / (sum(gaps) + sum(lengths)),
                segments=len(segments) // 3,
                of_none=self._prefilled_s[long_tokens, "none"] / long_s,
                blocked=len(waits),
            )

    def _long_blocking(self, model: GpuModel) -> None:
        """Measure how long short prompts wait that come all through one prefill of the longest."""
        long_tokens, plan = max(self._args.tokens), self._plan(USUAL)
        for _ in range(3):
            model.prefill_s(SHORT_TOKENS, plan)
        predicted_s = CostModel(self._shape, self._rates).prefill_s(long_tokens)
        delays_s = [SPAN * predicted_s / SHORTS] * SHORTS
        with model.recorded() as segments:
            waits = [
                wait_s
                for wait_s, _ in shorts_beside(model, plan, (long_tokens, SHORT_TOKENS), delays_s)
            ]
        lengths = [segment.end_s - segment.start_s for segment in segments]
        self._keep(
            "long_blocking",
            granularity=USUAL,
            long_tokens=long_tokens,
            **quantiles("blocking", waits, SHARES),
            **quantiles("segment", lengths, SHARES),
            blocked=len(waits),
        )

    def _shorts(
        self,
        model: GpuModel,
        granularity: str,
        long_tokens: int,
        long_s: float,
        count: int,
    ) -> Iterator[tuple[float, float]]:
        """Yield, for each short prompt that met the long one: seconds to its start, to its end.

        They come at the same shares of the long one's time, whatever the granularity.
        """
        plan, rng = self._plan(granularity), random.Random(self._args.seed)
        met, together = 0, min(TOGETHER, count)
        if granularity == "none":
            count, together = min(count, SHORTS_OF_NONE), 1
        for _ in range(count):  # some may find the long one ended
            if met >= count or not self._has(5):
                return
            at_s = sorted(rng.uniform(0.0, SPAN * long_s) for _ in range(together))
            delays_s = [after - before for before, after in pairwise([0.0, *at_s])]
            for found in shorts_beside(model, plan, (long_tokens, SHORT_TOKENS), delays_s):
                met += 1
                yield found

    def _hol(self, model: GpuModel) -> None:
        """Measure a short prompt's time to its token during the longest one."""
        long_tokens = max(self._args.tokens)
        for granularity in ("none", USUAL):
            plan = self._plan(granularity)
            alone = [model.prefill_s(SHORT_TOKENS, plan) for _ in range(6)]
            if not self._has(15):
                return
            long_s = self._prefill_s(model, long_tokens, granularity)
            found = self._shorts(model, granularity, long_tokens, long_s, HOL_SHORTS)
            during = [end_s for _, end_s in found]
            self._keep(
                "hol",
                granularity=granularity,
                long_tokens=long_tokens,
                short_tokens=SHORT_TOKENS,
                long_alone_s=long_s,
                short_alone_p50_s=median(alone[3:]),
                **quantiles("short_beside", during, SHARES),
                shorts=len(during),
            )

    def _decode(self, model: GpuModel, batch: int, granularity: str) -> None:
        plan = self._plan(granularity)
        context = min(CONTEXT, self._config.max_position) - 1
        for _ in range(3):
            model.decode_s(batch, context, plan)
        with model.recorded() as segments:
            took_s = [model.decode_s(batch, context, plan) for _ in range(DECODE_STEPS)]
        median_s = median(took_s)
        read_bytes = self._shape.weight_bytes + self._shape.head_bytes  # of the embedding, few rows
        self._keep(
            "decode",
            granularity=granularity,
            batch=batch,
            context=model.decode_context(batch, context),
            tokens_per_s=batch / median_s,
            **quantiles("step", took_s, (0.5, 1)),
            segments=len(segments) // DECODE_STEPS,
            gap_s=sum(gaps_of(segments)) / DECODE_STEPS,
            busy_s=sum(s.end_s - s.start_s for s in segments) / DECODE_STEPS,
            weight_gbytes_per_s=read_bytes / median_s / 1e9,
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
            name = labels[segment.index].op
            spent_s[RIDES_WITH.get(name, name)] += segment.end_s - segment.start_s
        for name, flops in self._flops(tokens).items():
            if spent_s.get(name):
                self._keep(
                    "operators",
                    operator=name,
                    tokens=tokens,
                    us=spent_s[name] * 1e6 / self._config.num_layers,
                    tflops_per_s=flops / spent_s[name] / 1e12,
                )
        self._keep(
            "operator_times", tokens=tokens, seconds=dict(spent_s), gap_s=sum(gaps_of(segments))
        )

    def _flops(self, tokens: int) -> dict[str, float]:
        """Return operations of all layers by operator."""
        config = self._config
        flops = {
            name: 2.0 * tokens * columns * depth * config.num_layers
            for name, (columns, depth) in self._checkpoint.layer_products().items()
        }
        pairs = attention_pairs(tokens, 0)
        flops["attention"] = 4 * config.num_heads * config.head_dim * pairs * config.num_layers
        return flops

    def _torch_device(self) -> torch.device | None:
        if not torch.cuda.is_available():
            self._keep("torch", failure=f"torch {torch.__version__} sees no GPU")
            return None
        return torch.device("cuda", self._choice.index)

    def _torch(self) -> None:
        device = self._torch_device()
        if device is None:
            return
        lengths = [tokens for tokens in self._args.tokens if tokens >= 512]
        few, products = [n for n in lengths if n <= LONG], self._checkpoint.layer_products()
        first = (  # attention is the same whatever the weights are
            gpu_torch.product_rows(device, products, few, "fp8")
            if self._form == "fp8"
            else gpu_torch.attention_rows(device, self._config, reversed(lengths))
        )
        for rows in (first, gpu_torch.product_rows(device, products, few)):
            for row in rows:
                self._keep(**row)
                if not self._has(15):
                    break
        torch.cuda.empty_cache()

    def _transformers(self) -> None:
        device = self._torch_device()
        if device is None:
            return
        of_all = (self._args.shape, self._config.num_layers, str(device))
        setting = gpu_peer.Setting(*of_all, min(self._args.peer_s, self._left_s()))
        context = min(CONTEXT, self._config.max_position) - 1
        with self._model() as model:
            decodes = [(n, model.decode_context(n, context)) for n in BATCHES]
            ours = gpu_peer.Ours(model, self._plan(USUAL))
            for row in gpu_peer.rows(setting, ours, self._args.tokens, decodes):
                self._keep("transformers", **row)

    def _make_run(self, model: GpuModel, tokens: int) -> None:
        """Measure how long making a run costs the engine's thread."""
        plan, took_s = self._plan(USUAL), []
        for _ in range(5):
            since_s = time.perf_counter()
            model.make(tokens, plan)
            took_s.append(time.perf_counter() - since_s)
        self._keep("make_run", tokens=tokens, seconds=median(took_s))
