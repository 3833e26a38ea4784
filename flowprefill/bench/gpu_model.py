"""GpuModel: a model on one GPU with an executor of its own; `bench gpu` measures on it.

It is what the engine has, without scheduler and requests, and with options of the native model that
the engine does not offer: depth of run-ahead, graphs or none.
"""

from __future__ import annotations

import itertools
import select
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from flowprefill.config import EngineConfig
from flowprefill.engine import calibration
from flowprefill.engine.cuda_device import CudaDevice
from flowprefill.engine.device_choice import DeviceChoice
from flowprefill.engine.loading import WeightSource, fill_model, model_shape
from flowprefill.scheduling.cost_model import MachineRates

if TYPE_CHECKING:
    from flowprefill import _cuda

BLOCK_TOKENS = EngineConfig().block_tokens
PATIENCE_S = 600.0  # for one run
ENDED = ("finished", "cancelled", "failed")


@dataclass(frozen=True, slots=True)
class Segment:
    """One executed segment; seconds on the monotonic clock, as the GPU's events tell."""

    run_id: int
    index: int
    start_s: float
    end_s: float


def gaps_of(segments: Sequence[Segment]) -> list[float]:
    """Return the seconds between the segments of each run in which the GPU did nothing."""
    return [
        max(after.start_s - before.end_s, 0.0)
        for before, after in pairwise(segments)
        if after.run_id == before.run_id
    ]


def load_weights(
    choice: DeviceChoice,
    checkpoint: WeightSource,
    fp8_sources: Collection[str] = (),
    quantization: str = "none",
) -> _cuda.Model:
    """Load a model that holds weights alone, for the models that share them.

    Args:
        fp8_sources: tensors that come in e4m3, and stay so.
        quantization: fp8: the other matrices of layers are rounded to it.
    """
    assert choice.module is not None
    options = {
        "device": choice.index,
        "quantizes_fp8": quantization == "fp8",
        "fp8_sources": list(fp8_sources),
    }
    model: _cuda.Model = choice.module.Model(checkpoint.graph, options)
    fill_model(model, checkpoint, in_blocks=fp8_sources)
    return model


class GpuModel:
    """Shared weights, cache for two prompts, and the executor; see the module."""

    def __init__(
        self,
        choice: DeviceChoice,
        checkpoint: WeightSource,
        weights: _cuda.Model,
        longest: int,
        options: dict[str, Any],
        max_sequences: int = 4,
        quantization: str = "none",
    ) -> None:
        """Start an executor of a model's weights; it captures graphs and measures kernels.

        Args:
            weights: the loaded model, see `load_weights`.
            longest: tokens of the longest prompt; the cache holds two of them, or of the longest
                probe.
            options: of the native model, added to those that follow from the prompt.
            max_sequences: of the largest batch that is decoded.
            quantization: of the weights: none or fp8.
        """
        assert choice.module is not None
        config = checkpoint.config
        self.cuda: Any = choice.module
        self._vocab_size = config.vocab_size
        self._shape = model_shape(checkpoint.graph, "bf16", quantization)
        probes = CudaDevice.probe_sizes
        longest = max(longest, probes.tokens)
        self._most = max(longest, min(probes.tokens + probes.context, config.max_position))
        self._blocks_of_one = -(-self._most // BLOCK_TOKENS)
        sizes = {
            "device": choice.index,
            "max_tokens": longest,
            "max_sequences": max_sequences,
            "max_context": config.max_position,
        }
        self._model: Any = weights.sharing_weights(sizes | options)
        self._blocks = max(2 * self._blocks_of_one, max_sequences)
        self._model.allocate_cache(BLOCK_TOKENS, self._blocks)
        self._ids = itertools.count(1)
        self._ended_s: dict[int, float] = {}
        self._executor: Any = self.cuda.Executor(self._model)
        self._executor.start()

    def close(self) -> None:
        """Stop the executor and give the GPU's memory back."""
        self._executor.stop()
        self._executor.pop_events()
        self._ended_s.clear()
        del self._executor, self._model

    # ---- runs ----------------------------------------------------------------------------------

    def make(self, tokens: int, plan: Any, slot: int = 0, seed: int = 0) -> Any:
        """Make the run that prefills a random prompt.

        Args:
            slot: 0 or 1: whose blocks; two runs that are alive at once need one each.
        """
        ids = np.random.default_rng(seed).integers(0, self._vocab_size, tokens, dtype=np.int32)
        sequence = self.cuda.BatchSequence(rows=tokens, context=0, block_table=self._table(slot))
        return self._model.make_run(next(self._ids), self.cuda.Batch(ids, [sequence]), plan)

    def _table(self, slot: int) -> Any:
        first = slot * self._blocks_of_one
        return np.arange(first, first + self._blocks_of_one, dtype=np.int32)

    def decode_context(self, batch: int, context: int) -> int:
        """Return how many cached tokens each of `batch` sequences can have, up to `context`."""
        return min(context, self._blocks // batch * BLOCK_TOKENS - 1)

    def decode_s(self, batch: int, context: int, plan: Any) -> float:
        """Decode one token of each sequence, chosen on the device; seconds as `prefill_s`.

        Args:
            context: tokens in each one's cache, see `decode_context`; whatever lies there.
        """
        context = self.decode_context(batch, context)
        blocks = -(-(context + 1) // BLOCK_TOKENS)
        sequences = [
            self.cuda.BatchSequence(
                rows=1,
                context=context,
                block_table=np.arange(i * blocks, (i + 1) * blocks, dtype=np.int32),
            )
            for i in range(batch)
        ]
        ids = np.zeros(batch, np.int32)
        run = self._model.make_run(
            next(self._ids), self.cuda.Batch(ids, sequences), plan, fetch_logits=False
        )
        return self._run_s(run)

    def dispatch(self, run: Any) -> None:
        """Make it the next to execute."""
        self._executor.dispatch(run)

    def cancel(self, run: Any) -> None:
        """End it, and wait until it has."""
        self._executor.cancel(run)
        self._wait(run)

    def _wait(self, run: Any) -> float:
        """Return when the run ended, on the monotonic clock."""
        deadline_s = time.monotonic() + PATIENCE_S
        while run.id not in self._ended_s:
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"run {run.id} is {run.state} after {PATIENCE_S:g} s")
            select.select([self._executor.event_fd], [], [], 0.1)
            for event in self._executor.pop_events():
                if event.kind in ENDED:
                    self._ended_s[event.run.id] = event.time_s
        return self._ended_s[run.id]

    def finish(self, run: Any) -> float:
        """Wait until a dispatched run has finished; returns when, on the monotonic clock.

        Raises:
            RuntimeError: it failed; says why.
        """
        ended_s = self._wait(run)
        if run.state != "finished":
            raise RuntimeError(f"run {run.id} is {run.state}: {run.error}")
        return ended_s

    def prefill_s(self, tokens: int, plan: Any) -> float:
        """Prefill one prompt on the idle GPU; seconds from its dispatch to its result."""
        return self._run_s(self.make(tokens, plan))

    def _run_s(self, run: Any) -> float:
        self.dispatch(run)
        ended_s = self.finish(run)
        return ended_s - float(run.accounting().dispatched_s)

    @contextmanager
    def recorded(self) -> Iterator[list[Segment]]:
        """Fill the list, on leaving, with the segments executed meanwhile, oldest first."""
        segments: list[Segment] = []
        since = self._executor.timeline().next
        yield segments
        records = self._executor.timeline(since).records
        segments += [Segment(r.run_id, r.segment, r.start_s, r.end_s) for r in records]

    # ---- reports -------------------------------------------------------------------------------

    def rates(self) -> MachineRates:
        """Measure what the planner cuts by."""
        make_probe = calibration.probes_of(
            self.cuda, self._model, self._blocks_of_one, self._vocab_size
        )
        return calibration.measure(
            self._executor, make_probe, self._shape, self._most, CudaDevice.probe_sizes
        )

    def graph_report(self) -> dict[str, Any]:
        """Return count, bytes and seconds of the captured graphs."""
        report: dict[str, Any] = self._model.graph_report()
        return report

    def gemm_report(self) -> list[_cuda.GemmReport]:
        """Return what was measured of each product: rows, columns, depth, kind, choice, times."""
        report: list[_cuda.GemmReport] = self._model.gemm_report()
        return report

    def cublas_lt(self) -> str:
        """Return ``used``, or why that library is not."""
        return self._model.library_failure or "used"

    def memory(self) -> dict[str, int]:
        """Return where the GPU's memory went, bytes."""
        block_bytes = self._model.bytes_per_block(BLOCK_TOKENS)
        return {
            "weight_bytes": self._model.weight_bytes,
            "lane_bytes": self._model.lane_bytes(BLOCK_TOKENS),
            "cache_bytes": self._blocks * block_bytes,
            "cache_bytes_per_token": block_bytes // BLOCK_TOKENS,
        }


def shorts_beside(
    model: GpuModel, plan: Any, tokens: tuple[int, int], delays_s: Iterable[float]
) -> Iterator[tuple[float, float]]:
    """Dispatch short prompts during a long one, which goes on after each, until that has ended.

    Args:
        tokens: of the long prompt and of a short one.
        delays_s: from the dispatch of the long one, at first and after each short one, to that of
            the next.

    Yields:
        Of each short one, seconds from its dispatch to the start of its first segment and to its
        result.
    """
    long = model.make(tokens[0], plan, slot=0)
    try:
        for delay_s in delays_s:
            short = model.make(tokens[1], plan, slot=1)
            model.dispatch(long)
            time.sleep(delay_s)
            if long.state != "running":
                return
            with model.recorded() as segments:
                model.dispatch(short)
                ended_s = model.finish(short)
            dispatched_s = short.accounting().dispatched_s
            started_s = [segment.start_s for segment in segments if segment.run_id == short.id]
            if started_s:
                yield max(started_s[0] - dispatched_s, 0.0), ended_s - dispatched_s
            if long.state != "suspended":
                return
    finally:
        model.cancel(long)
