"""LocalWorker: a model on a device of this machine, with its KV cache and native executor.

Made by Engine, used by Engine and EngineCore as a Worker; the only part of the engine that calls
the native modules.
"""

from __future__ import annotations

import math
import os
import select
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from flowprefill.config import GIB, EngineConfig, Granularity
from flowprefill.engine import calibration
from flowprefill.engine.device import longest_of
from flowprefill.engine.device_choice import open_model
from flowprefill.engine.loading import model_shape, plan_options, undisturbed
from flowprefill.engine.prompt_logprobs import SCORE
from flowprefill.engine.sampler import DeviceSampling
from flowprefill.engine.worker import WorkerLimits, WorkerStats
from flowprefill.errors import ConfigError
from flowprefill.scheduling import MachineRates
from flowprefill.scheduling.operator_rates import NONE, Corrections, OperatorTime

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from flowprefill.engine.device import FloatArray
    from flowprefill.engine.worker import Batch, RunHandle
    from flowprefill.models.checkpoint import Checkpoint, Progress

MAX_BLOCKS = 2**31 - 1  # of the KV cache: native code counts them in 32 bits
LONGEST_SLEEP_S = 86_400.0  # of one poll, which takes no more than 2**31 milliseconds


class LocalWorker:
    """See Worker.

    Attributes:
        dtype: what the device computes in.
        threads: compute threads of the executor.
    """

    def __init__(
        self, config: EngineConfig, checkpoint: Checkpoint, progress: Progress | None = None
    ) -> None:
        """Load the model and take the memory of its KV cache.

        Args:
            progress: called while loading with bytes done and bytes in all.

        Raises:
            CheckpointError, ConfigError: what is wrong with the files or the settings.
        """
        self._config = config
        self._model_name = checkpoint.name
        self._device, self._model = open_model(config, checkpoint, progress)
        self.granularity = (
            self._device.granularity
            if config.granularity == "auto"
            else Granularity.parse(config.granularity)
        )
        self.dtype, self.threads = self._device.dtype, self._device.threads
        self.shape = model_shape(
            checkpoint.graph,
            self.dtype,
            self._device.quantization,
            self._device.block_formats(checkpoint),
        )
        self.rates: MachineRates | None = None
        self._max_position = checkpoint.config.max_position
        self._vocab_size = checkpoint.config.vocab_size
        longest = longest_of(self._device.max_model_len, config, checkpoint.config)
        blocks = self._allocate_cache(longest)
        self.limits = WorkerLimits(
            longest,
            config.block_tokens,
            blocks,
            True,
            config.max_running or self._device.max_running,
        )
        self._planned: tuple[Corrections, Any] = NONE, None  # the last plan, and what it is for
        self._greedy = self._device.native.DeviceSampling(**DeviceSampling()._asdict())
        self._kept: calibration.RatesFile | None = None

    def start(self) -> None:
        """Start the executor, prepared for the rates kept from earlier; else measure them."""
        kept, rates = None, None
        if self._config.calibrate:
            kept = self._kept_rates()
            rates = kept.read()
        plan = None
        if rates is not None:
            plan = plan_options(self._device.native, self.granularity, rates)
        self._executor = self._device.start_executor(self._model, plan)
        if kept is not None and (rates is None or self._is_too_slow(rates)):
            rates = self._measure()
            kept.write(rates)
        self.rates, self._kept = rates, kept
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._sleep = select.poll()
        self._sleep.register(self._executor.event_fd, select.POLLIN)
        self._sleep.register(self._wake_fd, select.POLLIN)

    def stop(self) -> None:
        """Stop the executor; after the thread that polls has ended."""
        self._executor.stop()
        os.close(self._wake_fd)
        if self._kept is not None and self.rates is not None:
            better = calibration.mended(self.rates, self._planned[0], self._device.is_exclusive)
            if better is not None:
                self._kept.write(better)

    def now_s(self) -> float:
        """Return the monotonic clock, which the executor reads too."""
        return time.monotonic()

    # ---- runs ----------------------------------------------------------------------------------

    def make_run(self, batch: Batch) -> RunHandle:
        """Build the run over the new tokens of the sequences; they choose tokens if all can."""
        native = self._device.native
        tokens = [token for sequence in batch.sequences for token in sequence.tokens]
        packed = native.Batch(
            np.array(tokens, np.int32),
            [
                native.BatchSequence(rows=len(s.tokens), context=s.context, block_table=s.blocks)
                for s in batch.sequences
            ],
        )
        plan = self._plan(batch.corrections)
        model: Any = self._model
        run: RunHandle
        if batch.output != "logits":
            run = model.make_run(batch.run_id, packed, plan, output=batch.output)
            return run
        wanted = [s.sampling for s in batch.sequences]
        if not any(wanted):
            run = model.make_run(batch.run_id, packed, plan)
            return run
        # A device chooses for all or none: what it chooses for those that want logits is not read.
        run = model.make_run(
            batch.run_id, packed, plan,
            sampling=[self._native_sampling(each) for each in wanted],
            fetch_logits=None in wanted,
        )  # fmt: skip
        return run

    def _native_sampling(self, sampling: DeviceSampling | None) -> Any:
        if sampling is None or sampling.temperature == 0.0:
            return self._greedy  # made once: a step may have hundreds
        return self._device.native.DeviceSampling(**sampling._asdict())

    def dispatch(self, run: Any) -> bool:
        """Exchange the executor's mailbox; False: the run has ended."""
        try:
            self._executor.dispatch(run)
        except ValueError:
            return False
        return True

    def suspend(self, run: Any) -> bool:
        """Raise the run's own flag."""
        return self._executor.suspend(run)

    def cancel(self, run: Any) -> bool:
        """End the run now or at its next boundary."""
        return self._executor.cancel(run)

    def poll(self, until_s: float) -> list[Any]:
        """Sleep until the executor has posted an event, `wake` was called or the time has come."""
        wait_s = max(until_s - time.monotonic(), 0.0)
        wait_ms = None if wait_s == math.inf else math.ceil(min(wait_s, LONGEST_SLEEP_S) * 1e3)
        ready = self._sleep.poll(wait_ms)
        if any(fd == self._wake_fd for fd, _ in ready):
            os.eventfd_read(self._wake_fd)
        return self._executor.pop_events() if ready else []

    def wake(self) -> None:
        """Have `poll` return."""
        os.eventfd_write(self._wake_fd, 1)

    def logits(self, run: Any) -> FloatArray:
        """Return a finished run's logits, a view of native memory."""
        logits: FloatArray = self._device.native.logits(run)
        return logits

    def chosen(self, run: Any) -> list[int]:
        """Return a finished run's next tokens."""
        tokens: list[int] = self._device.native.sampled(run).tolist()
        return tokens

    def scores(self, run: Any) -> NDArray[Any]:
        """Return a finished run's scores, a view of native memory."""
        scores: NDArray[Any] = self._device.native.scores(run).view(SCORE)[:, 0]
        return scores

    def embeddings(self, run: Any) -> FloatArray:
        """Return a finished run's embeddings, a view of native memory."""
        embeddings: FloatArray = self._device.native.embeddings(run)
        return embeddings

    def zero_blocks(self, blocks: list[int]) -> None:
        """Clear KV blocks that may hold NaN."""
        self._model.zero_blocks(blocks)

    # ---- what it tells about itself ------------------------------------------------------------

    def set_granularity(self, granularity: Granularity) -> None:
        """Cut the runs made from now on so."""
        self.granularity = granularity
        self._planned = self._planned[0], None

    def stats(self) -> WorkerStats:
        """Return the executor's counts and the size of the workspaces."""
        native = self._executor.stats()
        return WorkerStats(
            preemptions=native.num_suspended,
            segments=native.num_segments,
            workspace_bytes=self._device.workspace_bytes(self._model),
            max_blocking_s=native.max_blocking_s,
        )

    def operator_times(self, run: Any) -> list[OperatorTime]:
        """Return what the segments of a finished run took; a GPU's do not tell."""
        rates = self._plan(self._planned[0]).rates
        return [OperatorTime(*each) for each in self._executor.operator_times(run, rates)]

    def timeline(self, since: int = 0) -> list[Any]:
        """Return what the executor's ring holds of the segments from that one on."""
        return self._executor.timeline(since).records

    def describe(self) -> dict[str, Any]:
        """Return what the device says of itself, and the granularity."""
        return {**self._device.describe(), "granularity": str(self.granularity)}

    # ---- making --------------------------------------------------------------------------------

    def _allocate_cache(self, longest: int) -> int:
        """Take the memory the settings name, or what the device gives; returns the blocks."""
        block_tokens = self._config.block_tokens
        block_bytes = self._model.bytes_per_block(block_tokens)
        wanted = int(self._config.kv_cache_gib * GIB) or self._device.cache_bytes(self._model)
        blocks = wanted // block_bytes
        if not 1 <= blocks <= MAX_BLOCKS:
            bound, limit = ("at least", 1) if blocks < 1 else ("at most", MAX_BLOCKS)
            raise ConfigError(
                f"kv_cache_gib: got {self._config.kv_cache_gib}, expected {bound} "
                f"{limit * block_bytes / GIB:.6g} ({limit} x {block_tokens} tokens)",
                param="kv_cache_gib",
            )
        try:
            self._model.allocate_cache(block_tokens, blocks)
        except (RuntimeError, MemoryError) as error:
            reason = "no such memory" if isinstance(error, MemoryError) else error
            raise ConfigError(
                f"kv_cache_gib: {blocks * block_bytes / GIB:.2f} GiB in addition to the "
                f"activations of {longest} tokens (max_model_len): {reason}",
                param="kv_cache_gib",
            ) from None
        return blocks

    def _kept_rates(self) -> calibration.RatesFile:
        folder = calibration.cache_folder(self._config)
        key = {
            "model": self._model_name,
            "dtype": self.dtype,
            "flops": self.shape.linear_flops_per_token,
            "block_tokens": self.limits.block_tokens,
            **self._device.identity(),
        }
        return calibration.RatesFile(folder, key)

    def _is_too_slow(self, rates: MachineRates) -> bool:
        """Return whether kept rates are of a busy machine; those of a device of our own never."""
        return not self._device.is_exclusive and calibration.were_measured_busy(
            self._executor, self._probes(), self.shape, self._longest_probe(), rates
        )

    def _measure(self) -> MachineRates:
        sizes = self._device.probe_sizes
        return calibration.measure(
            self._executor, self._probes(), self.shape, self._longest_probe(), sizes
        )

    def _probes(self) -> calibration.MakeProbe:
        return calibration.probes_of(
            self._device.native, self._model, self.limits.num_blocks, self._vocab_size
        )

    def _longest_probe(self) -> int:
        capacity = self.limits.num_blocks * self.limits.block_tokens
        return min(capacity, self._max_position)

    def _plan(self, corrections: Corrections) -> Any:
        """Return the planner's options, by the rates measured of late."""
        made_for, plan = self._planned
        if plan is None or made_for != corrections:
            own = undisturbed(corrections, self._device.is_exclusive)
            rates = self.rates or MachineRates()
            plan = plan_options(self._device.native, self.granularity, rates, own)
            self._planned = corrections, plan
        return plan
