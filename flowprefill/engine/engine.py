"""Engine: what users make and submit to. Joins tokenizer, KV blocks, scheduler and worker.

Every method may be called from any thread and from asyncio; none blocks on the device but `close`.
"""

from __future__ import annotations

import gc
import logging
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from flowprefill.config import EngineConfig, Granularity
from flowprefill.engine.core import EngineCore
from flowprefill.engine.gate import backlog_limit
from flowprefill.engine.intake import Intake, objectives_of
from flowprefill.engine.kv_blocks import BlockPool
from flowprefill.engine.local_worker import LocalWorker
from flowprefill.engine.records import (
    EngineObserver,
    EngineStats,
    TimelineEntry,
    timeline_entry,
)
from flowprefill.errors import InvalidRequest, NotReady
from flowprefill.models.chat_template import read_template_file
from flowprefill.models.checkpoint import Checkpoint, Progress, open_checkpoint
from flowprefill.request import SLO, Pooling, Request, StructuredOutput
from flowprefill.scheduling import (
    CostModel,
    MachineRates,
    Scheduler,
    SchedulerSettings,
)
from flowprefill.scheduling.admission import AdmissionLimits
from flowprefill.scheduling.outlook import work_s

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from flowprefill.engine.handle import Handle
    from flowprefill.models.tokenizer import Tokenizer
    from flowprefill.scheduling.cost_model import ModelShape
    from flowprefill.scheduling.operator_rates import Corrections
    from flowprefill.scheduling.policies import Policy

log = logging.getLogger(__name__)


class Engine:
    """One model on one device.

    Attributes:
        model_id: what the API calls the model.
        config: the settings it was made with.
        model_config: shape and constants of the model.
        max_model_len: longest prompt plus output, tokens.
        created: when the model was loaded, seconds since the epoch.
        sampling_defaults: how the model's authors want it sampled (generation_config.json); what
            SamplingParams does not name is not taken from there, the HTTP server does that.
    """

    def __init__(
        self,
        model: str | Path | Checkpoint = "smollm2-135m",
        config: EngineConfig | None = None,
        *,
        policy: Callable[[CostModel, SchedulerSettings], Policy] | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Load a model and start the executor; returns when requests can be submitted.

        Args:
            model: packaged name, Hugging Face folder, GGUF file, or ``ORG/NAME`` of a downloaded
                model on the hub; or a checkpoint that is open.
            policy: makes a scheduling policy of one's own; None: the one the settings name.
            progress: called while loading with bytes done and bytes in all.

        Raises:
            CheckpointError, ConfigError: what is wrong with the files or the settings.
        """
        self.config = config or EngineConfig()
        checkpoint = (
            model
            if isinstance(model, Checkpoint)
            else open_checkpoint(model, self.config.max_model_len)
        )
        self.model_id = checkpoint.name
        self.model_config = checkpoint.config
        self.tokenizer: Tokenizer = checkpoint.tokenizer
        self.sampling_defaults = checkpoint.sampling_defaults
        self._chat_template = checkpoint.chat_template
        if self.config.chat_template:
            text = read_template_file(self.config.chat_template)
            self._chat_template = self._chat_template.with_text(text)
        self._worker = LocalWorker(self.config, checkpoint, progress)
        self._worker.start()
        self.dtype, self.threads = self._worker.dtype, self._worker.threads
        limits = self._worker.limits
        self.max_model_len = limits.max_model_len
        self._pool = BlockPool(limits.num_blocks, limits.block_tokens, self.config.prefix_cache)
        try:
            self._core = self._make_core(policy)
            self._core.start()
        except BaseException:  # of a policy of the user's own; or no thread can be started
            self._worker.stop()
            raise
        self._intake = Intake(
            self._core,
            self.config,
            self.tokenizer,
            self.vocab_size,
            self.max_model_len,
            limits.num_blocks * limits.block_tokens,
        )
        self.created = int(time.time())
        self._is_open, self._process = True, os.getpid()

    # ---- what users call -----------------------------------------------------------------------

    def submit(self, request: Request | str, slo: SLO | str | None = None) -> Handle:
        """Admit a request and, if it is the most urgent, have it executed at once.

        Args:
            request: prompt and sampling parameters; a text: the prompt alone.
            slo: latency objectives; a text: those of this configured class; None: of the default.

        Returns:
            A handle to iterate, await, ask for the result, or cancel.

        Raises:
            InvalidRequest, PromptTooLong: what is wrong with the request.
            Overloaded: too much waits, or its class rejects it as late; says when to come back.
            NotReady: the engine is closing, has failed, or is that of the process we are a fork of.
            ProcessNotStarted: what compiles grammars does not start; the log says why. In each case
                nothing else is disturbed.
        """
        arrival_s = self._worker.now_s()
        request = Request(request) if isinstance(request, str) else request
        if not isinstance(request, Request):
            raise InvalidRequest.field("request", request, "a Request, or the prompt as a text")
        slo = objectives_of(slo, self.config)
        if os.getpid() != self._process:
            raise NotReady("this process was forked from the engine's: its threads are not here")
        self._core.check_load(request.tenant)  # a refusal must not wait for the tokenizer
        live = self._intake.live(request, slo, arrival_s)
        self._core.submit(live)
        return live.handle

    def embed(
        self,
        prompt: str | Sequence[int],
        slo: SLO | str | None = None,
        *,
        pooling: Pooling = "last",
    ) -> Handle:
        """Submit a prompt whose answer is an embedding, ``Completion.embedding``; raises as submit.

        Args:
            pooling: of the last token, or the mean of all.
        """
        return self.submit(Request(prompt, pooling=pooling), slo)

    def check_load(self, tenant: str = "") -> None:
        """Refuse a request before anything is done for it; raises Overloaded as submit would."""
        self._core.check_load(tenant)

    def knows_grammar(self, wanted: StructuredOutput) -> bool:
        """Whether `submit` would not have to compile it, which takes up to a second or two."""
        return self._intake.grammars.knows(wanted)

    def compile_grammar(self, wanted: StructuredOutput) -> None:
        """Compile it now; what is wrong with it, `submit` says. Raises ProcessNotStarted."""
        self._intake.grammars.prepare(wanted)

    def predicted_work_s(self, requests: Sequence[Request]) -> float:
        """Return the predicted time of requests that come together on an idle device, seconds.

        Equal prompts count once unless they are scored, each token of the output as wanted; a text
        counts at least as many tokens as it has eighths of characters. 0 where the machine is not
        calibrated.
        """
        cost_model = self._cost_model
        if not cost_model.is_calibrated:
            return 0.0
        lengths = {id(one.prompt): _length_of(one.prompt) for one in requests}
        prompts = {
            id(one) if one.output == "scores" else id(one.prompt): lengths[id(one.prompt)]
            for one in requests
        }
        room = self.max_model_len
        outputs = [
            min(_wanted_tokens(one, room), max(room - lengths[id(one.prompt)], 1))
            for one in requests
        ]
        return work_s(cost_model, [*prompts.values()], outputs, self._worker.limits.max_running)

    def render_chat(self, messages: list[dict[str, Any]], /, **template_kwargs: Any) -> str:
        """Turn chat messages into prompt text by the model's template, in another process.

        Raises:
            InvalidRequest: the messages do not fit the template, or its limits; or there is none.
            ProcessNotStarted: that process does not start; the log says why.
        """
        return self._chat_template.render(messages, **template_kwargs)

    def warm_chat(self) -> None:
        """Start what renders chats, so that the first one does not wait for it."""
        self._chat_template.warm()

    def warm_structured(self) -> None:
        """Make what structured output needs (0.5 s), so that the first such request is as quick."""
        self._intake.grammars.warm()

    def set_granularity(self, text: str) -> None:
        """Cut prefills otherwise from now on, e.g. to compare granularities on one loaded model.

        Args:
            text: as the setting ``granularity``, but not ``auto``.

        Raises:
            ConfigError: it is not a granularity.
            RuntimeError: requests are live. Nothing has changed then.
        """
        granularity = Granularity.parse(text)
        self._core.set_max_blocking(granularity.max_blocking_s)
        self._worker.set_granularity(granularity)

    def set_policy(self, policy: str, max_batch_tokens: int = 0) -> None:
        """Order requests otherwise from now on, e.g. to compare policies on one loaded model.

        What was learnt of predicted against true times is forgotten, as after a start.

        Args:
            policy: as the setting of that name.
            max_batch_tokens: as the setting of that name; 0: as it is.

        Raises:
            ConfigError: it is not a policy, or not a number of tokens.
            RuntimeError: requests are live. Nothing has changed then.
        """
        tokens = max_batch_tokens or self.config.max_batch_tokens
        config = replace(self.config, policy=policy, max_batch_tokens=tokens)
        cost_model = self._make_cost_model()
        self._core.set_scheduler(Scheduler(policy, cost_model, self._settings_of(config)))
        self.config, self._cost_model = config, cost_model

    def close(self, timeout: float | None = None) -> None:
        """Refuse new requests, wait up to ``timeout`` seconds (None: as long as it takes) for the
        live ones, cancel the rest, and stop. Idempotent."""
        self._is_open = False
        if os.getpid() == self._process:  # a forked child has none of the threads to stop
            self._core.close(timeout)
        self._intake.grammars.close()

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
    def chat_template(self) -> str:
        """The source of the model's chat template; empty if it has none."""
        return self._chat_template.text or ""

    @property
    def vocab_size(self) -> int:
        """Number of token ids the model knows."""
        return self.model_config.vocab_size

    def stats(self) -> EngineStats:
        """Return a snapshot of gauges and counters."""
        running, waiting, suspended, held = self._core.counts()
        blocks, worker = self._pool.stats, self._worker.stats()
        return EngineStats(
            running=running,
            waiting=waiting,
            suspended=suspended,
            held=held,
            kv_blocks_used=blocks.used,
            kv_blocks_cached=blocks.cached,
            kv_blocks_total=blocks.total,
            prefix_cache_queries=blocks.queried_tokens,
            prefix_cache_hits=blocks.hit_tokens,
            preemptions=worker.preemptions,
            segments=worker.segments,
            workspace_bytes=worker.workspace_bytes,
            max_blocking_s=worker.max_blocking_s,
        )

    def subscribe(self, observer: EngineObserver) -> None:
        """Have an observer told of ended requests, preemptions and decisions."""
        self._core.observers.append(observer)

    def timeline(self, since: int = 0) -> list[TimelineEntry]:
        """Return the segments executed last, oldest first.

        Args:
            since: leave out that many of all since the start; `stats().segments` counts them.
        """
        names = dict(self._core.run_names)
        return [timeline_entry(record, names) for record in self._worker.timeline(since)]

    def decisions(self) -> list[dict[str, Any]]:
        """Return the scheduler's latest decisions with their reasons, oldest first."""
        return list(self._core.decisions)

    def story(self, request_id: str) -> dict[str, Any] | None:
        """Return what happened to one of the last requests and why; None if it is not known."""
        return self._core.story(request_id)

    def recent_requests(self, reply_id: str = "") -> list[dict[str, Any]]:
        """Return the last requests in short, the newest first; or only a reply's choices."""
        return self._core.recent(reply_id)

    def describe(self) -> dict[str, Any]:
        """Return device, element type and why, in words."""
        return {**self._worker.describe(), "policy": self.config.policy}

    @property
    def model_shape(self) -> ModelShape:
        """What the model asks of the machine, with its weights as they are kept."""
        return self._worker.shape

    @property
    def rates(self) -> MachineRates:
        """What calibration measured, or what is assumed without."""
        return self._worker.rates or MachineRates()

    @property
    def corrections(self) -> Corrections:
        """True over calibrated time of each kind of operator, as learnt so far."""
        return self._cost_model.operators.corrections

    # ---- making --------------------------------------------------------------------------------

    def _make_core(
        self, policy: Callable[[CostModel, SchedulerSettings], Policy] | None
    ) -> EngineCore:
        settings = self._settings_of(self.config)
        self._cost_model = cost_model = self._make_cost_model()
        own = policy(cost_model, settings) if policy is not None else self.config.policy
        scheduler = Scheduler(own, cost_model, settings)
        config, is_calibrated = self.config, cost_model.is_calibrated
        limits = AdmissionLimits(
            config.max_waiting, config.max_waiting_tokens,
            backlog_limit(config.max_backlog_s, is_calibrated=is_calibrated), config.tenant_share,
        )  # fmt: skip
        return EngineCore(scheduler, self._worker, self._pool, limits)

    def _make_cost_model(self) -> CostModel:
        rates = self._worker.rates
        return CostModel(self._worker.shape, rates, is_calibrated=rates is not None)

    def _settings_of(self, config: EngineConfig) -> SchedulerSettings:
        return SchedulerSettings(
            max_batch_tokens=config.max_batch_tokens,
            max_running=self._worker.limits.max_running,
            max_blocking_s=self._worker.granularity.max_blocking_s,
            late_share=config.late_share,
            class_shares=config.class_shares(),
        )


def _length_of(prompt: str | Sequence[int]) -> int:
    return max(len(prompt) // 8, 1) if isinstance(prompt, str) else len(prompt)


def _wanted_tokens(request: Request, room: int) -> int:
    wanted = request.sampling.max_tokens if request.generates else 0
    return room if wanted is None else wanted
