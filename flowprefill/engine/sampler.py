"""Sampler: chooses the next token of one request from its logits; the event thread calls it.

Order of processing: logprobs are of the model's own distribution; then repetition, presence and
frequency penalties, logit_bias, the mask of stop tokens before min_tokens, the mask of structured
output's grammar, temperature, min_p, top_k, top_p, and one draw. Each filter renormalises what the
one before it left.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flowprefill.engine.draw import Ids, Logits, draw_position, narrowed, top_k_ids, top_p_ids
from flowprefill.engine.stop import stop_token_ids
from flowprefill.errors import RequestFailed
from flowprefill.request import TokenLogprob

if TYPE_CHECKING:
    from flowprefill.engine.grammars import Constraint
    from flowprefill.request import SamplingParams

# Temperatures below are greedy: dividing by them says nothing more than which logit is largest.
GREEDY_BELOW = 1e-5
# Penalised logits stay within this, so that differences of two cannot overflow float32.
_MAX_LOGIT = float(np.finfo(np.float32).max) / 4
# A device takes float32: numbers that would be rounded to 1, or to 0, are outside of its ranges.
_LARGEST_BELOW_1 = float(np.nextafter(np.float32(1), np.float32(0)))
_SMALLEST = float(np.finfo(np.float32).tiny)


class DeviceSampling(NamedTuple):
    """How a device chooses the next token of one sequence.

    Attributes:
        temperature: 0: the most likely token, whatever the rest says.
        top_k: 0: all.
        uniform: the random number, in [0, 1).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    uniform: float = 0.0


class SampledToken(NamedTuple):
    """One sampled token.

    Attributes:
        token_id: its id.
        logprob: natural logarithm of its probability in the model's distribution; None when
            logprobs weren't asked for.
        top_logprobs: the most likely tokens, best first, as many as were asked for.
        is_last: the structured output is complete with it.
    """

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[TokenLogprob, ...] = ()
    is_last: bool = False


class Sampler:
    """Samples one request's tokens, one call per token, in order.

    One uniform number is drawn per sampled token, from a generator of this request's own: what a
    seeded request gets depends on its logits only, not on what it is batched with. Ties are broken
    by the lower token id everywhere, so top_k keeps exactly k tokens and top_k=1 is greedy.

    Thread: one thread at a time. Nothing blocks.
    Cost: greedy is one pass; otherwise a few passes over the vocabulary, and a sort of only those
    tokens that can be in the nucleus.
    """

    def __init__(
        self,
        params: SamplingParams,
        vocab_size: int,
        prompt_ids: Sequence[int] | NDArray[np.int32],
        seed: int,
        eos_token_ids: Iterable[int] = (),
        constraint: Constraint | None = None,
    ) -> None:
        """Make the sampler of one request.

        Args:
            params: what the user asked for.
            vocab_size: number of logits.
            prompt_ids: the prompt, for the repetition penalty.
            seed: used when ``params.seed`` is None; any 64-bit integer.
            eos_token_ids: the model's end-of-sequence tokens, not sampled before ``min_tokens``.
            constraint: its position in the grammar of its structured output.
        """
        self._params = params
        self._vocab_size = vocab_size
        # The narrowest nucleus is the most likely token.
        self._is_greedy = params.temperature < GREEDY_BELOW or params.top_p == 0
        self._uniform: np.random.Generator | None = None
        if not self._is_greedy:
            chosen = seed if params.seed is None else params.seed
            self._uniform = np.random.Generator(np.random.PCG64(chosen % 2**64))
        self._seen = _make_seen(params, prompt_ids)
        stops = stop_token_ids(params, eos_token_ids) if params.min_tokens else frozenset[int]()
        self._masked = np.array(sorted(t for t in stops if 0 <= t < vocab_size), dtype=np.intp)
        bias = {t: value for t, value in params.logit_bias.items() if t < vocab_size}
        self._biased = np.array(list(bias), dtype=np.intp)
        self._bias = np.array(list(bias.values()), dtype=np.float32)
        self._constraint = constraint
        self._changes_logits = self._seen is not None or constraint is not None or bool(bias)
        self._count = 0
        self._drawn: float | None = None  # the next token's random number, if it was asked for

    def on_device(self) -> DeviceSampling | None:
        """Return what a device needs to choose the next token itself; None: it needs the logits.

        The same until `sample` or `accept` takes a token: a run that is given up costs no number.
        """
        params = self._params
        if params.logprobs is not None or self._adjusts():
            return None
        if self._uniform is None:
            return DeviceSampling()
        uniform = min(self._next_uniform(), _LARGEST_BELOW_1)
        top_p = max(params.top_p, _SMALLEST)
        return DeviceSampling(params.temperature, params.top_k, top_p, params.min_p, uniform)

    def accept(self, token_id: int) -> SampledToken:
        """Take the token that a device has chosen as `on_device` told it; below 0: it found none.

        Raises:
            RequestFailed: it found none; the sampler is unchanged.
        """
        if token_id < 0:
            raise RequestFailed(
                f"sampling output token {self._count}: there is no token to choose: NaN or "
                "infinity among the logits, or all of them -inf"
            )
        self._drawn = None
        self._count += 1
        return SampledToken(token_id)

    def prepare(self) -> None:
        """Work out now what the next `sample` would, while the device computes its logits."""
        if self._constraint is not None:
            self._constraint.prepare()

    def sample(self, logits: Logits) -> SampledToken:
        """Choose the next token.

        Args:
            logits: float32 [vocab_size]; only read, never modified or kept.

        Raises:
            RequestFailed: NaN or infinity among the logits, or nothing left to choose from; the
                sampler is unchanged. Or the grammar has met its limits.
        """
        if logits.shape != (self._vocab_size,):
            message = f"logits: got shape {logits.shape}, expected ({self._vocab_size},)"
            raise ValueError(message)
        _check_finite(logits, self._count)
        adjusted = self._adjust(logits)
        if self._uniform is None:
            token_id = int(adjusted.argmax())
            if adjusted[token_id] == -np.inf:
                raise _nothing_left(self._count)
        else:
            token_id = self._draw(adjusted)
        self._drawn = None
        self._count += 1
        if self._seen is not None:
            self._seen.add(token_id)
        is_last = self._constraint is not None and self._constraint.accept(token_id)
        if self._params.logprobs is None:
            return SampledToken(token_id, is_last=is_last)
        sampled = _with_logprobs(logits, token_id, self._params.logprobs)
        return sampled._replace(is_last=True) if is_last else sampled

    def _adjusts(self) -> bool:
        """Whether it is not the model's own logits that decide."""
        return self._changes_logits or self._masks()

    def _adjust(self, logits: Logits) -> Logits:
        """Return logits after penalties, bias and masks; the same array when there are none."""
        if not self._adjusts():
            return logits
        adjusted = logits.copy()
        if self._seen is not None:
            self._seen.penalise(adjusted, self._params)
        if self._biased.size:
            adjusted[self._biased] += self._bias
        if self._masks():
            adjusted[self._masked] = -np.inf
        if self._constraint is not None:
            forbidden = self._constraint.forbidden()
            if forbidden is not None:
                np.putmask(adjusted, forbidden, -np.inf)
        return adjusted

    def _masks(self) -> bool:
        return self._masked.size > 0 and self._count < self._params.min_tokens

    def _next_uniform(self) -> float:
        assert self._uniform is not None
        if self._drawn is None:
            self._drawn = self._uniform.random()
        return self._drawn

    def _draw(self, logits: Logits) -> int:
        """Filter and draw by inverting the cumulative distribution, tokens in order of their id."""
        params = self._params
        top = logits.max()
        if top == -np.inf:
            raise _nothing_left(self._count)
        with np.errstate(over="ignore"):  # to -inf, which is probability 0
            scaled = (logits - top) / np.float32(params.temperature)
        ids: Ids | None = None  # None: all
        if params.min_p > 0:
            ids = np.flatnonzero(scaled >= np.log(params.min_p))
            scaled = scaled[ids]
        if 0 < params.top_k < scaled.size:
            kept = top_k_ids(scaled, params.top_k)
            ids, scaled = narrowed(ids, kept), scaled[kept]
        weights = np.exp(scaled)
        if params.top_p < 1:
            kept = top_p_ids(weights, params.top_p)
            ids, weights = narrowed(ids, kept), weights[kept]
        position = draw_position(weights, self._next_uniform())
        return position if ids is None else int(ids[position])


class _SeenTokens:
    """The distinct tokens a penalty applies to, and how often each was generated (may be 0)."""

    def __init__(self, prompt_ids: Ids) -> None:
        self._size = prompt_ids.size
        self._ids = np.concatenate([prompt_ids, np.zeros(64, dtype=np.intp)])
        self._counts = np.zeros(self._ids.size, dtype=np.float64)
        self._position = {int(token): index for index, token in enumerate(prompt_ids)}

    def add(self, token_id: int) -> None:
        position = self._position.setdefault(token_id, self._size)
        if position == self._size:
            if position == self._ids.size:
                self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
                self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
            self._ids[position] = token_id
            self._size += 1
        self._counts[position] += 1

    def penalise(self, logits: Logits, params: SamplingParams) -> None:
        """Apply the penalties in place, all in float64 and clipped to what float32 holds well."""
        ids, counts = self._ids[: self._size], self._counts[: self._size]
        values = logits[ids].astype(np.float64)
        factor = params.repetition_penalty
        values = np.where(values > 0, values / factor, values * factor)
        values -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)
        # What is ruled out stays so.
        logits[ids] = np.where(values > -np.inf, values.clip(-_MAX_LOGIT, _MAX_LOGIT), values)


def _make_seen(
    params: SamplingParams, prompt_ids: Sequence[int] | NDArray[np.int32]
) -> _SeenTokens | None:
    repeats = params.repetition_penalty != 1
    if not repeats and params.presence_penalty == 0 and params.frequency_penalty == 0:
        return None
    # Only the repetition penalty looks at the prompt.
    return _SeenTokens(np.unique(np.asarray(prompt_ids if repeats else (), dtype=np.intp)))


def _check_finite(logits: Logits, count: int) -> None:
    """Raise for NaN or +inf; -inf is a token ruled out. One pass: max carries NaN along."""
    top = logits.max()
    if top < np.inf:
        return
    bad = int(np.isnan(logits).sum())
    what = f"{bad} of {logits.size} logits are NaN" if bad else "a logit is infinite"
    message = f"sampling output token {count}: {what}"
    raise RequestFailed(message)


def _nothing_left(count: int) -> RequestFailed:
    return RequestFailed(
        f"sampling output token {count}: every token is ruled out (all logits are -inf, or "
        "stop_token_ids with min_tokens and structured output leave none)"
    )


def _with_logprobs(logits: Logits, token_id: int, alternatives: int) -> SampledToken:
    """Return the token with natural-log probabilities of the model's own distribution."""
    top = logits.max()
    log_total = float(top) + float(np.log(np.exp(logits - top).sum(dtype=np.float64)))
    best = (
        top_k_ids(logits, min(alternatives, logits.size)) if alternatives else np.empty(0, np.intp)
    )
    best = best[np.argsort(-logits[best], kind="stable")]
    return SampledToken(
        token_id,
        float(logits[token_id]) - log_total,
        tuple(TokenLogprob(int(i), float(logits[i]) - log_total) for i in best),
    )
