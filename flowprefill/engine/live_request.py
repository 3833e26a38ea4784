"""LiveRequest: everything the engine keeps about one request, from submit to its terminal event.

Changed by the engine's core under its lock; the token side (sampler, decoder, stop checker) only
by the event thread.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from flowprefill.config import PLAIN_CLASS, ServiceClass
from flowprefill.engine.prompt_logprobs import SCORE, PromptLogprobs
from flowprefill.engine.worker import BatchSequence
from flowprefill.errors import RequestFailed
from flowprefill.request import Completion, Timings, Token
from flowprefill.scheduling import Job
from flowprefill.scheduling.job import BACKGROUND

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from flowprefill.engine.handle import Handle
    from flowprefill.engine.kv_blocks import Reservation
    from flowprefill.engine.sampler import SampledToken, Sampler
    from flowprefill.engine.stop import StopChecker
    from flowprefill.errors import FlowPrefillError
    from flowprefill.models.tokenizer import IncrementalDecoder
    from flowprefill.request import SLO, FinishReason, Request, RunOutput

    Outcome = NDArray[np.float32] | int  # a row of logits, an embedding; or the token chosen


@dataclass(slots=True)
class TokenSide:
    """What turns a request's logits into text; made for its first token, not before."""

    sampler: Sampler
    stop: StopChecker
    decoder: IncrementalDecoder


@dataclass(slots=True, eq=False)
class LiveRequest:
    """One request that has not ended.

    Attributes:
        ids: prompt and generated tokens.
        num_prompt: how many of them are the prompt.
        computed: tokens whose keys and values are in the cache.
        reservation: its KV blocks; None while it waits for memory.
        work_id: the work whose run uses its blocks now; they are not freed before it ends.
        error: how it will end if not by a finish reason of its own.
        service: what its class promises and allows.
        predicted_s: predicted time of its prefill, nothing cached.
        is_demoted: admitted as best effort, since it was predicted late.
        is_promised: admitted since it was predicted on time, so not given up for others.
        ended_with: how a request without tokens ends, once it has its answer.
        embedding: its answer, if that is one.
        considered_s: when the scheduler, or the queue for KV blocks, first knew of it.
        suspensions: see Timings; known at its end.
        tokens: those it has made, but for one whose text is not worked out yet: `sampled`.
        token_times_s: when its tokens were made, on a clock that stands while it is held.
        is_held: no client takes its tokens, so none are made.
        held_s: how long that was so, up to the last resume; since when, while it is held.
    """

    request: Request
    slo: SLO
    handle: Handle
    make_token_side: Callable[[], TokenSide]
    arrival_s: float
    ids: list[int]
    num_prompt: int
    service: ServiceClass = PLAIN_CLASS
    predicted_s: float = 0.0
    is_demoted: bool = False
    is_promised: bool = False
    token_side: TokenSide | None = None
    computed: int = 0
    reservation: Reservation | None = None
    work_id: int | None = None
    is_scheduled: bool = False
    is_ended: bool = False
    finish_reason: FinishReason | None = None
    ended_with: FinishReason | None = None
    embedding: NDArray[np.float32] | None = None
    error: FlowPrefillError | None = None
    tokens: list[Token] = field(default_factory=list)
    sampled: SampledToken | None = None
    token_times_s: list[float] = field(default_factory=list)
    considered_s: float | None = None
    queue_s: float | None = None
    prefill_run_s: float = 0.0
    suspended_s: float = 0.0
    preemptions: int = 0
    cached_tokens: int = 0
    cancelled_at_s: float | None = None
    cancel_to_free_s: float | None = None
    blocking_s: float | None = None
    suspensions: tuple[tuple[float, float], ...] = ()
    is_held: bool = False
    held_s: float = 0.0
    held_since_s: float = 0.0

    @property
    def id(self) -> str:
        """The request's id."""
        return self.request.id

    @property
    def output(self) -> RunOutput:
        """What its next run has to give; scores and embeddings come once, with the prompt."""
        has_answer = self.tokens or self.ended_with is not None
        output = self.request.output
        # Of one token alone there is nothing to score.
        return "logits" if has_answer or (output == "scores" and self.num_prompt == 1) else output

    @property
    def output_tokens(self) -> int:
        """How many tokens it has made."""
        return len(self.ids) - self.num_prompt

    @property
    def extra_tokens(self) -> int:
        """Tokens after its own that its KV blocks must have room for before it runs."""
        return int(self.request.generates)

    @property
    def finds_prefix(self) -> bool:
        """Whether tokens found in the prefix cache need not be computed."""
        return self.output not in ("scores", "mean")

    @property
    def deadline_s(self) -> float:
        """When the first token is due; inf without an objective, and for best effort."""
        if self.is_demoted:
            return math.inf
        return self.slo.deadline_s(self.arrival_s)

    def job(self) -> Job:
        """Return the scheduler's view; the KV blocks must be reserved."""
        first_token = not self.tokens
        return Job(
            id=self.id,
            arrival_s=self.arrival_s,
            prompt_tokens=len(self.ids) - self.computed,
            context_tokens=self.computed,
            ttft_deadline_s=self.deadline_s if first_token else self._next_token_due_s(),
            tpot_s=math.inf if self.slo.tpot is None else self.slo.tpot,
            on_miss=self.slo.on_miss if first_token else "demote",
            priority=self.request.priority,
            weight=self.service.weight,
            service_class=BACKGROUND if self.service.is_background else self.slo.service_class,
            tenant=self.request.tenant,
            client=self.request.client or self.request.tenant,
            output=self.output,
            decodes=self.request.generates and self.request.sampling.max_tokens != 1,
            is_promised=self.is_promised and first_token,
        )

    def _next_token_due_s(self) -> float:
        if self.slo.tpot is None:
            return math.inf
        return self.token_times_s[-1] + self.held_s + self.slo.tpot

    def hold(self, now: float, *, is_held: bool) -> None:
        """Note that it is held from now on, or not any more; the engine's lock is held."""
        self.is_held = is_held
        if is_held:
            self.held_since_s = now
        elif self.token_times_s:  # a step that had begun may have made one meanwhile
            last_s = self.token_times_s[-1] + self.held_s
            self.held_s += max(now - max(self.held_since_s, last_s), 0.0)

    def _note_time(self, now: float) -> None:
        """Note when a token was made; none before the last, though `hold` may come just now."""
        times = self.token_times_s
        times.append(max(now - self.held_s, times[-1]) if times else now)

    def next_piece(self, *, chooses_token: bool) -> BatchSequence:
        """Return what the next run computes of it; the KV blocks must be reserved.

        Args:
            chooses_token: the worker may choose the next token, if its sampler lets it.
        """
        assert self.reservation is not None
        return BatchSequence(
            tokens=self.ids[self.computed :],
            context=self.computed,
            blocks=self.reservation.table,
            sampling=self._side().sampler.on_device() if chooses_token else None,
        )

    def take(self, outcome: Outcome, scores: NDArray[Any] | None, now: float) -> bool:
        """Take what a run gives it; returns whether that is a token, for `newest_token`.

        Args:
            outcome: its embedding, float32 [hidden], or see `advance`.
            scores: of all its prompt's tokens, if they were asked for.

        Raises:
            RequestFailed: NaN or infinity among the values.
        """
        if scores is not None:
            top = self.request.sampling.prompt_logprobs or 0
            self.handle.prompt_logprobs = PromptLogprobs(self.ids, scores, top)
        elif self.request.sampling.prompt_logprobs is not None and not self.tokens:
            none = np.zeros(1, SCORE)
            self.handle.prompt_logprobs = self.handle.prompt_logprobs or PromptLogprobs(
                self.ids, none, 0
            )
        if self.request.generates:
            self.advance(outcome, now)
            return True
        if self.request.pooling is not None:
            assert isinstance(outcome, np.ndarray)
            self.embedding = _of_length_1(outcome)
        self.ended_with = "length" if self.request.pooling is None else "stop"
        self._note_time(now)
        return False

    def advance(self, outcome: Outcome, now: float) -> None:
        """Sample the next token and decide whether generation ends with it.

        Its text is worked out here only if that decides, else in `newest_token`.

        Args:
            outcome: [vocab] float32, the logits of its last computed token; or the token that the
                device has chosen.

        Raises:
            RequestFailed: the logits are not finite.
        """
        side = self._side()
        if isinstance(outcome, int):
            sampled = side.sampler.accept(outcome)
        else:
            sampled = side.sampler.sample(outcome)
        self.ids.append(sampled.token_id)
        self._note_time(now)
        self.sampled = sampled
        if sampled.is_last or side.stop.may_end_with(sampled.token_id):
            self.newest_token()

    def newest_token(self) -> Token:
        """Return the token made last, with its text; the event thread, before the next is made."""
        sampled, self.sampled = self.sampled, None
        if sampled is None:
            return self.tokens[-1]
        side = self._side()
        reason = side.stop.reason_of(sampled.token_id, is_last=sampled.is_last)
        if reason == "stop":
            piece = side.decoder.flush()
        else:
            piece = side.decoder.push(sampled.token_id)
            if reason == "length" or sampled.is_last:
                piece += side.decoder.flush()
        released = side.stop.push(sampled.token_id, piece, is_last=sampled.is_last)
        token = Token(
            token_id=sampled.token_id,
            text=released.text,
            logprob=sampled.logprob,
            top_logprobs=sampled.top_logprobs,
            finish_reason=released.finish_reason,
        )
        self.tokens.append(token)
        return token

    def prepare_sampling(self) -> None:
        """Work out what the next token's sampling needs; the event thread, no lock held."""
        if self.token_side is not None and self.error is None and not self.is_ended:
            self.token_side.sampler.prepare()

    def _side(self) -> TokenSide:
        if self.token_side is None:
            self.token_side = self.make_token_side()
        return self.token_side

    def end_with_last_token(self) -> None:
        """Note whether the newest token was the last; the engine's lock is held.

        A last token that its reader has seen wins over a cancel that came while it was sampled.
        """
        reason = self.tokens[-1].finish_reason if self.tokens else self.ended_with
        if reason is not None:
            self.finish_reason, self.error, self.cancelled_at_s = reason, None, None

    def timings(self, now: float) -> Timings:
        """Return where the time went so far."""
        times = self.token_times_s
        ttft = times[0] - self.arrival_s if times else None
        mean_itl = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None
        return Timings(
            queue=now - self.arrival_s if self.queue_s is None else self.queue_s,
            prefill_run=self.prefill_run_s,
            suspended=self.suspended_s,
            preemptions=self.preemptions,
            ttft=ttft,
            predicted_ttft=self.handle.predicted_ttft,
            total=now - self.arrival_s,
            mean_itl=mean_itl,
            slo_met=self._slo_met(ttft, mean_itl),
            cached_tokens=self.cached_tokens,
            preprocess=(now if self.considered_s is None else self.considered_s) - self.arrival_s,
            suspensions=self.suspensions,
        )

    def _slo_met(self, ttft: float | None, mean_itl: float | None) -> bool | None:
        if self.slo.ttft is None and self.slo.tpot is None:
            return None
        if ttft is None or self.error is not None:
            return False
        ttft_met = self.slo.ttft is None or ttft <= self.slo.ttft
        tpot_met = self.slo.tpot is None or mean_itl is None or mean_itl <= self.slo.tpot
        return ttft_met and tpot_met

    def deliver(self, now: float) -> None:
        """Tell the handle how it ended. Exactly once, after the blocks were freed; no lock held."""
        timings = self.timings(now)
        if self.error is not None:
            self.handle.fail(self.error, timings)
            return
        assert self.finish_reason is not None
        self.handle.finish(
            Completion(
                request_id=self.id,
                prompt_tokens=self.num_prompt,
                text="".join(token.text for token in self.tokens),
                tokens=tuple(self.tokens),
                finish_reason=self.finish_reason,
                timings=timings,
                prompt_logprobs=self.handle.prompt_logprobs,
                embedding=self.embedding,
            )
        )


def _of_length_1(embedding: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return a copy of Euclidean length 1; raises RequestFailed where there is none."""
    length = float(np.sqrt(np.square(embedding, dtype=np.float64).sum()))
    if not 0 < length < math.inf:
        raise RequestFailed(f"the embedding's length is {length}, expected a number > 0")
    return (embedding / length).astype(np.float32)
