"""The backend that serves requests in virtual time: the simulator under a profile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from flowprefill.bench.goodput.measurement import Measurement, Served, Stretch, summarised
from flowprefill.bench.goodput.setting import Setting
from flowprefill.config import Granularity
from flowprefill.scheduling import SchedulerSettings
from flowprefill.scheduling.cost_model import attention_pairs
from flowprefill.simulation import Configuration, Profile, WorkCosts, simulate
from flowprefill.traces import TraceRequest

DECISIONS_PER_REQUEST = 10  # kept where details are asked for: more than there are events


class SimBackend:
    """The engine's scheduler on a virtual clock; thousands of requests per second."""

    is_fast = True

    def __init__(
        self,
        profile: str,
        *,
        noise: float = 0.0,
        bias: float = 1.0,
        role: Literal["prefill", "mixed"] = "prefill",
    ) -> None:
        """Load a profile by name or file; noise, bias and role as `simulate` takes them."""
        self.profile = Profile.load(profile)
        self.name = f"simulator, {self.profile.name}"
        self._noise, self._bias = noise, bias
        self._role: Literal["prefill", "mixed"] = role
        self._costs: dict[str, WorkCosts] = {}

    def costs(self, granularity: str) -> WorkCosts:
        """Return the times of works cut so; kept, since plans are costly."""
        if granularity not in self._costs:
            self._costs[granularity] = WorkCosts(self.profile, Granularity.parse(granularity))
        return self._costs[granularity]

    def solo_s(self, prompt_tokens: int) -> float:
        """Return the true time of an undisturbed prefill, seconds."""
        return self.costs("none").prefill_s(prompt_tokens, attention_pairs(prompt_tokens, 0))

    def least_s(self, prompt_tokens: int) -> float:
        """Return the machine time that a prompt costs at least, however it is packed, seconds.

        Products at the machine's full rate and attention, without overheads and reading of weights
        that packed prompts share.
        """
        shape, rates = self.profile.shape, self.profile.rates
        linear_s = prompt_tokens * shape.linear_flops_per_token / rates.gemm_flops_per_s
        pairs = attention_pairs(prompt_tokens, 0)
        return linear_s + pairs * shape.attention_flops_per_pair / rates.attention_flops_per_s

    def close(self) -> None:
        """Nothing is held."""

    def measure(
        self, setting: Setting, requests: Sequence[TraceRequest], seed: int, *, is_detailed: bool
    ) -> Measurement:
        """Simulate; the seed is that of the noise."""
        granularity = Granularity.parse(setting.granularity)
        settings = SchedulerSettings(
            max_batch_tokens=setting.most_batch_tokens,
            max_blocking_s=granularity.max_blocking_s,
        )
        result = simulate(
            requests,
            Configuration(setting.policy, granularity, settings),
            self.profile,
            seed=seed,
            noise=self._noise,
            bias=self._bias,
            role=self._role,
            costs=self.costs(setting.granularity),
            keep_stretches=is_detailed,
            keep_decisions=DECISIONS_PER_REQUEST * len(requests) if is_detailed else 0,
        )
        served = [Served(one.request, one.ttft_s, one.is_on_time) for one in result.outcomes]
        first_s = requests[0].at_s
        numbers = {
            decision.dispatch.id: int(decision.dispatch.jobs[0].id)
            for _, _, decision in result.decisions
            if decision.dispatch is not None and not decision.dispatch.is_decode
        }
        stretches = [
            Stretch(numbers.get(one.run.id, -1), one.start_s - first_s, one.end_s - first_s)
            for one in result.stretches
        ]
        return summarised(
            served,
            result.blocking_s,
            result.preemptions,
            stretches=stretches,
            is_detailed=is_detailed,
        )
