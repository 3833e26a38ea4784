"""A scheduling policy of one's own: the shortest prompt goes first; they end in order of length."""

# ruff: noqa: ARG002 (this order needs no clock)

from __future__ import annotations

from collections.abc import Sequence

from flowprefill import Engine, Request, SamplingParams
from flowprefill.policies import BasePolicy, Rank, Verdict, Work


class FewestTokensFirst(BasePolicy):
    """Orders by prompt length; a shorter prompt suspends a longer one."""

    name = "fewest_tokens_first"

    def rank(self, work: Work, now: float) -> Rank:
        """Return the key to sort by."""
        return Rank((work.prompt_tokens,))

    def should_preempt(self, current: Work, waiting: Sequence[Work], now: float) -> Verdict:
        """Preempt for a prompt of less than half the length."""
        return Verdict(2 * waiting[0].prompt_tokens < current.prompt_tokens, "shorter")


def main() -> None:
    """Submit prompts of four lengths, longest first."""
    with Engine("smollm2-135m", policy=FewestTokensFirst) as engine:
        sampling = SamplingParams(temperature=0, max_tokens=1)
        handles = [engine.submit(Request([1000 + n] * n, sampling)) for n in (4000, 1000, 250, 60)]
        for handle in handles:
            timings = handle.result().timings
            print(f"{handle.prompt_tokens:5} tokens: first token after {timings.ttft:.3f} s")


if __name__ == "__main__":
    main()
