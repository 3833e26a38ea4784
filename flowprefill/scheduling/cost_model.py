"""Predicted times of prefills and decode steps; the scheduler asks it, the engine calibrates it.

Pure: rates are measured elsewhere and given in. One prediction is

    overhead + max(weight bytes / bandwidth, tokens * flops per token / GEMM rate)
             + (token, context token) pairs * flops per pair / attention rate + output head

so context that is in the cache costs attention, not projections. A decode step has one row for
each sequence's whole cache: there attention takes at least the time to read the cache. The rates
are corrected online, each by a factor of its own (operator_rates.py): by the executed time of every
segment where the worker tells it, else by that of whole runs. What the formula misses then is
corrected by one factor for each kind of work.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING, NamedTuple

from flowprefill.scheduling.operator_rates import Corrections, OperatorRates

if TYPE_CHECKING:
    from collections.abc import Iterable

    from flowprefill.scheduling.job import WorkKind
    from flowprefill.scheduling.operator_rates import OperatorTime

KINDS: tuple[WorkKind, ...] = ("prefill", "decode")
LEARNING_RATE = 0.1  # share of an observed log error that goes into the correction
MAX_CORRECTION = 8.0
WHOLE_RUN = 10  # timed segments that the time of a whole run tells as much as
STEPS_BETWEEN = 8  # rates are learnt from one decode step in so many: there are many, all alike
MAX_STEP = 4.0  # one observation counts at most as this ratio: a stalled machine is no new truth
WINDOW = 256  # observations the error quantiles are taken from
ENOUGH = 16  # observations before the quantiles are believed
UNKNOWN_OVERRUN = 1.25  # measured / predicted until then


def _check_positive(owner: object, names: Iterable[str]) -> None:
    for name in names:
        value = getattr(owner, name)
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{type(owner).__name__}.{name}: got {value}, expected a number > 0")


@dataclass(frozen=True, slots=True)
class MachineRates:
    """What the machine does per second; measured by the engine's calibration.

    The defaults are slower than any machine worth using: before calibration predictions are too
    long rather than too short.
    """

    gemm_flops_per_s: float = 2e10
    attention_flops_per_s: float = 1e10
    weight_bytes_per_s: float = 5e9
    run_overhead_s: float = 2e-3

    def __post_init__(self) -> None:
        _check_positive(self, (field.name for field in fields(self)))


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What a model asks of the machine.

    Attributes:
        linear_flops_per_token: of all projections of all layers.
        weight_bytes: of those projections, as they are stored.
        attention_flops_per_pair: per (token, context token) pair, over all layers.
        head_flops_per_sequence: of the output head, for one row: a sequence needs its last only,
            unless its prompt is scored.
        head_bytes: of the output head.
        cache_bytes_per_token: keys and values of one token, over all layers; 0: reading them
            costs nothing.
        expert_bytes: those of weight_bytes that belong to experts of a mixture.
        expert_share: part of the experts that one row has.
    """

    linear_flops_per_token: float
    weight_bytes: float
    attention_flops_per_pair: float
    head_flops_per_sequence: float
    head_bytes: float
    cache_bytes_per_token: float = 0.0
    expert_bytes: float = 0.0
    expert_share: float = 1.0

    def __post_init__(self) -> None:
        names = [field.name for field in fields(self) if field.default is MISSING]
        _check_positive(self, names)
        if not (math.isfinite(self.cache_bytes_per_token) and self.cache_bytes_per_token >= 0):
            raise ValueError(
                f"ModelShape.cache_bytes_per_token: got {self.cache_bytes_per_token}, expected a "
                "number >= 0"
            )

    def read_bytes(self, rows: int) -> float:
        """Return the bytes of projections that so many rows read: few rows meet not all experts."""
        if not self.expert_bytes:
            return self.weight_bytes
        return self.weight_bytes - self.expert_bytes * (1.0 - self.expert_share) ** rows


class RunShape(NamedTuple):
    """How much a run computes.

    Attributes:
        tokens: new ones, of all its prompts; of a decode step: its sequences.
        pairs: (token, visible token) pairs; of a decode step: tokens in the cache.
        head_rows: rows that the output head computes.
    """

    tokens: int
    pairs: float
    head_rows: int


def attention_pairs(tokens: int, context: int) -> float:
    """Return how many (token, visible token) pairs causal attention over new tokens has."""
    return tokens * context + tokens * (tokens + 1) / 2


class CostModel:
    """Predicts seconds of work; corrects itself from what was measured. One thread at a time."""

    def __init__(
        self, shape: ModelShape, rates: MachineRates | None = None, *, is_calibrated: bool = False
    ) -> None:
        self.shape = shape
        self.rates = rates if rates is not None else MachineRates()
        self.is_calibrated = is_calibrated
        self.operators = OperatorRates()
        self._is_told_segments = False
        self._corrected = self.rates
        self._cache_bytes_per_s = self.rates.weight_bytes_per_s  # corrected
        self._correction: dict[WorkKind, float] = dict.fromkeys(KINDS, 1.0)
        self._ratios: dict[WorkKind, deque[float]] = {kind: deque(maxlen=WINDOW) for kind in KINDS}
        self._seen = dict.fromkeys(KINDS, 0)
        self._overrun: dict[WorkKind, float] = dict.fromkeys(KINDS, 1.0)
        self._overrun_at = dict.fromkeys(KINDS, 0)  # observations after which it is taken anew

    def prefill_s(self, tokens: int, context: int = 0, head_rows: int = 1) -> float:
        """Return the predicted time to prefill one prompt on its cached context, seconds."""
        return self.packed_prefill_s(tokens, attention_pairs(tokens, context), head_rows)

    def nominal_s(self, shape: RunShape) -> float:
        """Return a prefill's time without the correction: of equal ones the same at all times."""
        rates = self.rates
        return self._rest_s(shape.tokens, shape.head_rows, rates) + self._attention_s(
            shape.pairs, rates
        )

    def packed_prefill_s(self, tokens: int, pairs: float, head_rows: int) -> float:
        """Return the predicted time of a packed prefill from its sums; O(1), for batching."""
        rates = self._corrected
        rest_s = self._rest_s(tokens, head_rows, rates)
        return self._correction["prefill"] * (rest_s + self._attention_s(pairs, rates))

    def decode_s(self, sequences: int, total_context: int) -> float:
        """Return the predicted time of one decode step over sequences with so much context."""
        rates = self._corrected
        read_s = total_context * self.shape.cache_bytes_per_token / self._cache_bytes_per_s
        attention = max(self._attention_s(total_context, rates), read_s)
        return self._correction["decode"] * (self._rest_s(sequences, sequences, rates) + attention)

    def observe(
        self,
        kind: WorkKind,
        predicted_s: float,
        measured_s: float,
        shape: RunShape | None = None,
    ) -> None:
        """Learn from one finished work.

        Args:
            predicted_s: what this model said, correction included, seconds.
            measured_s: time it was executing, suspensions not counted, seconds.
            shape: what it computed; None: not known, and only the kind's factor is learnt.
        """
        if not (predicted_s > 0 and measured_s > 0 and math.isfinite(measured_s)):
            return
        ratio = measured_s / predicted_s
        self._ratios[kind].append(ratio)
        if shape is not None:
            if not self._is_told_segments and self.learns_from(kind):
                parts, other_s = self._parts(kind, shape)
                self.operators.observe(parts, other_s, measured_s, WHOLE_RUN)
                self._correct()
            ratio = measured_s / self._run_s(kind, shape)  # by what is known now: rates have moved
        self._seen[kind] += 1
        step = min(max(ratio, 1 / MAX_STEP), MAX_STEP) ** LEARNING_RATE
        self._correction[kind] = _bounded(self._correction[kind] * step)

    def learns_from(self, kind: WorkKind) -> bool:
        """Return whether the rates are to be learnt from the work that is observed next."""
        return kind == "prefill" or self._seen[kind] % STEPS_BETWEEN == 0

    def observe_operators(self, times: Iterable[OperatorTime]) -> None:
        """Learn from the executed segments of a run; whole runs no longer move the rates then."""
        self._is_told_segments = True
        rates = self.rates
        for time in times:
            parts = (
                time.product_flops / rates.gemm_flops_per_s,
                time.weight_bytes / rates.weight_bytes_per_s,
                time.attention_flops / rates.attention_flops_per_s,
                time.cache_bytes / rates.weight_bytes_per_s,
            )
            self.operators.observe(parts, time.other_s, time.seconds, time.segments)
        self._correct()

    @property
    def corrections(self) -> Corrections:
        """What segments are to be cut by; see OperatorRates.planned."""
        return self.operators.planned

    def correction(self, kind: WorkKind) -> float:
        """Return the factor learnt so far; 1 is none."""
        return self._correction[kind]

    def error_quantile(self, kind: WorkKind, q: float) -> float:
        """Return a quantile of measured / predicted over the last works; NaN before the first."""
        ratios = sorted(self._ratios[kind])
        if not ratios:
            return math.nan
        return ratios[min(int(q * len(ratios)), len(ratios) - 1)]

    def overrun(self, kind: WorkKind) -> float:
        """Return measured / predicted time that nine works in ten stay within, at least 1."""
        ratios = self._ratios[kind]
        if len(ratios) < ENOUGH:
            return UNKNOWN_OVERRUN
        if self._seen[kind] >= self._overrun_at[kind]:
            self._overrun_at[kind] = self._seen[kind] + ENOUGH
            self._overrun[kind] = max(1.0, self.error_quantile(kind, 0.9))
        return self._overrun[kind]

    def optimistic_prefill_s(self, predicted_s: float) -> float:
        """Return the shortest time a prefill may plausibly take; what is hopeless then, is."""
        if len(self._ratios["prefill"]) >= ENOUGH:
            return predicted_s * min(1.0, self.error_quantile("prefill", 0.05))
        return predicted_s * (0.8 if self.is_calibrated else 0.25)

    def _correct(self) -> None:
        factors = self.operators.corrections
        self._corrected = corrected(self.rates, factors)
        self._cache_bytes_per_s = self.rates.weight_bytes_per_s / factors.cache

    def _run_s(self, kind: WorkKind, shape: RunShape) -> float:
        if kind == "decode":
            return self.decode_s(shape.tokens, int(shape.pairs))
        return self.packed_prefill_s(*shape)

    def _parts(
        self, kind: WorkKind, shape: RunShape
    ) -> tuple[tuple[float, float, float, float], float]:
        """Return what the calibrated rates predict for each kind of operator, and the overhead.

        Which rate bounds products and cached attention is told by the corrected ones.
        """
        rates, model, factors = self.rates, self.shape, self.operators.corrections
        by_products = by_weights = 0.0
        layers = (model.linear_flops_per_token, shape.tokens, model.read_bytes(shape.tokens))
        head = (model.head_flops_per_sequence, shape.head_rows, model.head_bytes)
        for flops, rows, weight_bytes in (layers, head):
            if not rows:
                continue
            multiply_s = rows * flops / rates.gemm_flops_per_s
            read_s = weight_bytes / rates.weight_bytes_per_s
            if factors.products * multiply_s >= factors.weights * read_s:
                by_products += multiply_s
            else:
                by_weights += read_s
        attention_s, cache_s = self._attention_s(shape.pairs, rates), 0.0
        if kind == "decode":
            cache_s = shape.pairs * model.cache_bytes_per_token / rates.weight_bytes_per_s
            is_read = factors.cache * cache_s > factors.attention * attention_s
            attention_s, cache_s = (0.0, cache_s) if is_read else (attention_s, 0.0)
        return (by_products, by_weights, attention_s, cache_s), rates.run_overhead_s

    def _attention_s(self, pairs: float, rates: MachineRates) -> float:
        return pairs * self.shape.attention_flops_per_pair / rates.attention_flops_per_s

    def _rest_s(self, tokens: int, head_rows: int, rates: MachineRates) -> float:
        """Return the overhead, products and output head of a work."""
        shape = self.shape
        linear = max(
            shape.read_bytes(tokens) / rates.weight_bytes_per_s,
            tokens * shape.linear_flops_per_token / rates.gemm_flops_per_s,
        )
        head = max(
            shape.head_bytes / rates.weight_bytes_per_s,
            head_rows * shape.head_flops_per_sequence / rates.gemm_flops_per_s,
        )
        return rates.run_overhead_s + linear + (head if head_rows else 0.0)


def corrected(rates: MachineRates, factors: Corrections) -> MachineRates:
    """Return the rates that the factors make of the calibrated ones; the cache has none."""
    return MachineRates(
        rates.gemm_flops_per_s / factors.products,
        rates.attention_flops_per_s / factors.attention,
        rates.weight_bytes_per_s / factors.weights,
        rates.run_overhead_s,
    )


def _bounded(correction: float) -> float:
    return min(max(correction, 1 / MAX_CORRECTION), MAX_CORRECTION)
