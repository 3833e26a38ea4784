"""Engine: what users make and submit to. Joins model, KV cache, tokenizer, scheduler and executor.

Every method may be called from any thread and from asyncio; none blocks on the device but `close`.
Long because what users call, what the engine tells and how it is made are one class.
"""

from __future__ import annotations

import gc
import itertools
import logging
import math
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from flowprefill.config import EngineConfig, Granularity
from flowprefill.engine import calibration
from flowprefill.engine.core import EngineCore
from flowprefill.engine.device import longest_of, open_model
from flowprefill.engine.handle import Handle
from flowprefill.engine.kv_blocks import BlockPool
from flowprefill.engine.native import model_shape, native_plan
from flowprefill.engine.records import (
    EngineObserver,
    EngineStats,
    TimelineEntry,
    timeline_entry,
)
from flowprefill.engine.sampler import Sampler
from flowprefill.engine.sequence import Sequence, TokenSide
from flowprefill.engine.stop import StopChecker
from flowprefill.errors import ConfigError, InvalidRequest, NotReady, PromptTooLong
from flowprefill.models.checkpoint import Progress, open_checkpoint
from flowprefill.request import SLO, Request
from flowprefill.scheduling import (
    CostModel,
    MachineRates,
    ModelShape,
    Scheduler,
    SchedulerSettings,
    WorkKind,
)
from flowprefill.scheduling.admission import AdmissionLimits

if TYPE_CHECKING:
    from collections.abc import Callable

    from flowprefill.engine.device import FloatArray, NativeRun
    from flowprefill.models.tokenizer import Tokenizer
    from flowprefill.scheduling.policies import Policy

log = logging.getLogger(__name__)

GIB = 1 << 30
COARSE_BLOCKING_S = 0.02  # what the scheduler assumes where segments have no budget


class Engine:
    """One model on one device.

    Attributes:
        model_id: what the API calls the model.
        config: the settings it was made with.
        model_config: shape and constants of the model.
        max_model_len: longest prompt plus output, tokens.
        created: when the model was loaded, seconds since the epoch.
    """

    def __init__(
        self,
        model: str | Path = "smollm2-135m",
        config: EngineConfig | None = None,
        *,
        policy: Callable[[CostModel, SchedulerSettings], Policy] | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Load a model and start the executor; returns when requests can be submitted.

        Args:
            model: packaged name, Hugging Face folder, or GGUF file.
            policy: makes a scheduling policy of one's own; None: the one the settings name.
            progress: called while loading with bytes done and bytes in all.

        Raises:
            CheckpointError, ConfigError: what is wrong with the files or the settings.
        """
        self.config = config or EngineConfig()
        checkpoint = open_checkpoint(model)
        self.model_id = checkpoint.name
        self.model_config = checkpoint.config
        self.tokenizer: Tokenizer = checkpoint.tokenizer
        self._chat_template = checkpoint.chat_template
        self._granularity = Granularity.parse(self.config.granularity)
        self._device, self._model = open_model(self.config, checkpoint, progress)
        self.dtype, self.threads = self._device.dtype, self._device.threads
        self.max_model_len = longest_of(self._device, self.config, self.model_config)
        self._pool = self._allocate_cache()
        self._cost_model = self._start_executor()
        self._core = self._make_core(policy)
        self._plans: dict[float, dict[str, Any]] = {}
        self._seeds = itertools.count(time.time_ns())
        self.created = int(time.time())
        self._is_open, self._process = True, os.getpid()
        self._core.start()

    # ---- what users call -----------------------------------------------------------------------

    def submit(self, request: Request, slo: SLO | None = None) -> Handle:
        """Admit a request and, if it is the most urgent, have it executed at once.

        Args:
            request: prompt and sampling parameters.
            slo: latency objectives; None: the configured default class.

        Returns:
            A handle to iterate, await, ask for the result, or cancel.

        Raises:
            InvalidRequest, PromptTooLong: what is wrong with the request.
            Overloaded: too much waits; says when to come back.
            NotReady: the engine is closing, has failed, or is that of the process we are a fork of.
            In each case nothing else is disturbed.
        """
        arrival_s = time.monotonic()
        if os.getpid() != self._process:
            raise NotReady("this process was forked from the engine's: its threads are not here")
        ids = self._token_ids(request)
        slo = slo or self.config.default_slo()
        due_s = math.inf if slo.ttft is None else arrival_s + slo.ttft
        stopped = self._core.stop_early(len(ids), due_s)
        try:
            room = self._room_for(ids, request)
            sequence = self._make_sequence(request, slo, ids, room)
            sequence.arrival_s = arrival_s
            self._core.submit(sequence)
        finally:
            if stopped is not None:
                self._core.let_go_on(stopped)
        return sequence.handle

    def render_chat(self, messages: list[dict[str, Any]], /, **template_kwargs: Any) -> str:
        """Turn chat messages into prompt text by the model's template, in another process.

        Raises:
            InvalidRequest: the messages do not fit the template, or its limits; or there is none.
        """
        return self._chat_template.render(messages, **template_kwargs)

    def warm_chat(self) -> None:
        """Start what renders chats, so that the first one does not wait for it."""
        self._chat_template.warm()

    def set_granularity(self, text: str) -> None:
        """Cut prefills otherwise from now on, e.g. to compare granularities on one loaded model.

        Args:
            text: as the setting ``granularity``.

        Raises:
            ConfigError: it is not a granularity. RuntimeError: requests are live. Nothing has
            changed then.
        """
        granularity = Granularity.parse(text)
        self._core.set_max_blocking(granularity.budget_s or COARSE_BLOCKING_S)
        self._granularity = granularity
        self._plans.clear()

    def close(self, timeout: float | None = None) -> None:
        """Refuse new requests, wait up to ``timeout`` seconds (None: as long as it takes) for the
        live ones, cancel the rest, and stop. Idempotent."""
        self._is_open = False
        if os.getpid() == self._process:  # a forked child has none of the threads to stop
            self._core.close(timeout)

    @staticmethod
    def freeze_garbage() -> None:
        """Take what lives now out of Python's garbage collection, for processes that only serve.

        Torch and a model's files leave half a million objects; a full collection that visits them
        all holds every thread up for about 100 ms.
        """
        gc.collect()
        gc.freeze()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close(0.0)

    # ---- what it tells about itself ------------------------------------------------------------

    @property
    def has_failed(self) -> bool:
        """Whether it has ended every request and takes no more; the log says why."""
        return self._core.has_failed

    @property
    def is_ready(self) -> bool:
        """Whether it takes requests."""
        is_here = os.getpid() == self._process
        return self._is_open and is_here and not self._core.has_failed

    @property
    def vocab_size(self) -> int:
        """Number of token ids the model knows."""
        return self.model_config.vocab_size

    def stats(self) -> EngineStats:
        """Return a snapshot of gauges and counters."""
        running, waiting, suspended = self._core.counts()
        blocks, native = self._pool.stats, self._executor.stats()
        return EngineStats(
            running=running,
            waiting=waiting,
            suspended=suspended,
            kv_blocks_used=blocks.used,
            kv_blocks_cached=blocks.cached,
            kv_blocks_total=blocks.total,
            prefix_cache_queries=blocks.queried_tokens,
            prefix_cache_hits=blocks.hit_tokens,
            preemptions=native["num_suspended"],
            segments=native["num_segments"],
            workspace_bytes=self._device.workspace_bytes(self._model),
            max_blocking_s=native["max_blocking_s"],
        )

    def subscribe(self, observer: EngineObserver) -> None:
        """Have an observer told of ended requests, preemptions and decisions."""
        self._core.observers.append(observer)

    def timeline(self) -> list[TimelineEntry]:
        """Return the segments executed last, oldest first."""
        names = dict(self._core.run_names)
        return [timeline_entry(record, names) for record in self._executor.timeline()[0]]

    def decisions(self) -> list[dict[str, Any]]:
        """Return the scheduler's latest decisions with their reasons, oldest first."""
        return list(self._core.decisions)

    def describe(self) -> dict[str, Any]:
        """Return device, element type and why, in words."""
        return {
            **self._device.describe(),
            "granularity": str(self._granularity),
            "policy": self.config.policy,
        }

    @property
    def rates(self) -> MachineRates:
        """What calibration measured."""
        return self._cost_model.rates

    # ---- making --------------------------------------------------------------------------------

    def _allocate_cache(self) -> BlockPool:
        block_tokens = self.config.block_tokens
        block_bytes = self._model.bytes_per_block(block_tokens)
        wanted = int(self.config.kv_cache_gib * GIB) or self._device.cache_bytes(self._model)
        blocks = wanted // block_bytes
        if blocks < 1:
            raise ConfigError(
                f"kv_cache_gib: got {self.config.kv_cache_gib}, expected at least "
                f"{block_bytes / GIB:.4f} (one block of {block_tokens} tokens)",
                param="kv_cache_gib",
            )
        try:
            self._model.allocate_cache(block_tokens, blocks)
        except RuntimeError as error:
            raise ConfigError(
                f"kv_cache_gib: {blocks * block_bytes / GIB:.2f} GiB beside the activations of "
                f"{self.max_model_len} tokens (max_model_len): {error}",
                param="kv_cache_gib",
            ) from None
        return BlockPool(blocks, block_tokens, self.config.prefix_cache)

    def _start_executor(self) -> CostModel:
        """Start the executor, prepared for the rates kept from earlier; else measure them."""
        shape = model_shape(self.model_config, self.dtype)
        if not self.config.calibrate:
            self._executor = self._device.start_executor(self._model, None)
            return CostModel(shape)
        folder = Path(self.config.cache_dir or calibration.default_cache_dir())
        key = {
            "model": self.model_id,
            "dtype": self.dtype,
            "flops": shape.linear_flops_per_token,
            "block_tokens": self._pool.block_tokens,
            **self._device.identity(),
        }
        file = calibration.RatesFile(folder, key)
        rates = file.read()
        plan = native_plan(self._granularity, rates) if rates is not None else None
        self._executor = self._device.start_executor(self._model, plan)
        if rates is None:
            rates = self._measure(shape)
            file.write(rates)
        return CostModel(shape, rates, is_calibrated=True)

    def _measure(self, shape: ModelShape) -> MachineRates:
        capacity = self._pool.num_blocks * self._pool.block_tokens
        most = min(capacity, self.model_config.max_position)
        make_probe = calibration.probes_of(self._model, self._pool.num_blocks)
        return calibration.measure(self._executor, make_probe, shape, most)

    def _make_core(
        self, policy: Callable[[CostModel, SchedulerSettings], Policy] | None
    ) -> EngineCore:
        settings = SchedulerSettings(
            max_batch_tokens=self.config.max_batch_tokens,
            max_running=self.config.max_running,
            max_blocking_s=self._granularity.budget_s or COARSE_BLOCKING_S,
        )
        own = policy(self._cost_model, settings) if policy is not None else None
        scheduler = Scheduler(own or self.config.policy, self._cost_model, settings)
        limits = AdmissionLimits(self.config.max_waiting, self.config.max_waiting_tokens)
        return EngineCore(scheduler, self._executor, self._pool, self, limits)

    def _token_ids(self, request: Request) -> list[int]:
        if isinstance(request.prompt, str):
            self.tokenizer.check_fits(request.prompt, self.max_model_len)
            ids = self.tokenizer.encode(request.prompt, request.add_special_tokens)
            if not ids:
                raise InvalidRequest.field("prompt", request.prompt, "at least one token")
        else:
            ids = list(request.prompt)
        if {*map(type, ids)} == {int} and min(ids) >= 0 and max(ids) < self.vocab_size:
            return ids
        for token in ids:
            is_id = isinstance(token, (int, np.integer)) and not isinstance(token, bool)
            if not is_id or not 0 <= token < self.vocab_size:
                allowed = f"token ids in 0..{self.vocab_size - 1}"
                raise InvalidRequest.field("prompt", token, allowed)
        return ids

    def _room_for(self, ids: list[int], request: Request) -> int:
        """Return how many tokens may be generated, at least one."""
        capacity = self._pool.num_blocks * self._pool.block_tokens
        limit = min(self.max_model_len, capacity)
        if len(ids) >= limit:
            raise PromptTooLong(
                f"prompt: got {len(ids)} tokens, expected at most {limit - 1} (max_model_len is "
                f"{self.max_model_len}, the KV cache holds {capacity} tokens, one is to generate)",
                param="prompt",
            )
        wanted = request.sampling.max_tokens
        room = limit - len(ids)
        if wanted is not None and len(ids) + wanted > self.max_model_len:
            raise PromptTooLong(
                f"max_tokens: got {wanted} on a prompt of {len(ids)} tokens, expected at most "
                f"{self.max_model_len - len(ids)} (max_model_len is {self.max_model_len})",
                param="max_tokens",
            )
        return room if wanted is None else min(room, wanted)

    def _make_sequence(self, request: Request, slo: SLO, ids: list[int], room: int) -> Sequence:
        eos = self.tokenizer.eos_ids
        params, num_prompt, seed = request.sampling, len(ids), next(self._seeds)
        sequence = Sequence(
            request=request,
            slo=slo,
            handle=Handle(request.id, len(ids), lambda: self._core.cancel(sequence)),
            make_token_side=lambda: TokenSide(
                Sampler(params, self.vocab_size, ids[:num_prompt], seed, eos),
                StopChecker(params, eos, room),
                self.tokenizer.incremental_decoder(keeps_space=True),
            ),
            arrival_s=0.0,
            ids=ids,
            num_prompt=num_prompt,
            extra_tokens=1,
        )
        return sequence

    # ---- what the core calls -------------------------------------------------------------------

    def make_run(self, run_id: int, sequences: list[Sequence]) -> NativeRun:
        """Build the run over the not yet computed tokens of the sequences; for the core."""
        tokens = [sequence.new_tokens() for sequence in sequences]
        entries = []
        for new, sequence in zip(tokens, sequences, strict=True):
            assert sequence.reservation is not None
            table = np.array(sequence.reservation.block_ids, dtype=np.int32)
            entries.append((len(new), sequence.computed, table))
        rows = tokens[0] if len(tokens) == 1 else np.concatenate(tokens)
        is_decode = len(rows) == len(tokens)
        plan = self._plan("decode" if is_decode else "prefill")
        if is_decode and self._device.chooses_tokens:
            sampling = [sequence.device_sampling() for sequence in sequences]
            if None not in sampling:  # then no logits have to come to the host
                model: Any = self._model
                run: NativeRun = model.make_run(
                    run_id, rows, entries, plan, sampling=sampling, fetch_logits=False
                )
                return run
        return self._model.make_run(run_id, rows, entries, plan)

    def _plan(self, kind: WorkKind) -> dict[str, Any]:
        """Return the planner's options, by the rates measured of late where those are better.

        Where they are worse others use the cores too, and shorter segments would only add to that.
        """
        slowdown = max(round(min(self._cost_model.correction(kind), 1.0), 1), 0.1)
        if slowdown not in self._plans:
            self._plans[slowdown] = native_plan(self._granularity, self._cost_model.rates, slowdown)
        return self._plans[slowdown]

    def outcomes(self, run: NativeRun) -> FloatArray | list[int]:
        """Return a finished run's logits, [sequences, vocab], or its tokens; for the core."""
        return self._device.outcomes(run)

    def zero_blocks(self, blocks: list[int]) -> None:
        """Clear KV blocks that may hold NaN; for the core."""
        self._model.zero_blocks(blocks)
