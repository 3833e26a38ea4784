"""Job: the scheduler's view of one request; interface.py says what happens to it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from flowprefill.request import OnMiss, RunOutput

WorkKind = Literal["prefill", "decode"]
BACKGROUND = "background"  # service class that runs only when nothing else can


@dataclass(slots=True)
class Job:
    """The scheduler's view of a request whose KV blocks are reserved.

    Attributes:
        id: unique among the live jobs.
        arrival_s: when the request arrived; its deadlines count from here.
        prompt_tokens: tokens to compute, those found in the cache not counted. 0 means that the
            prompt has been computed elsewhere: the job starts as a decoding sequence.
        context_tokens: tokens that are in the cache already.
        ttft_deadline_s: when the first token is due; inf is best effort.
        tpot_s: wanted time between tokens; inf is best effort.
        on_miss: `demote`: behind all jobs that can meet their deadline; `drop`: ended once the
            deadline can no longer be met.
        priority: among equally urgent jobs the smaller goes first (as in vLLM).
        weight: how much its being on time counts; where not all can be, those with the most time
            per weight are given up.
        service_class: name of its class, for shares and reports; empty: none.
        tenant: whom it belongs to, for fairness; empty: no tenant is named.
        client: with whom its decode steps are shared fairly: its tenant, or an address; empty: all
            that name none are one.
        output: what its prefill gives; a prefill packs jobs of one output.
        decodes: whether tokens may follow its first.
        is_promised: it was admitted because its deadline can be met: not given up for others.
    """

    id: str
    arrival_s: float
    prompt_tokens: int
    context_tokens: int = 0
    ttft_deadline_s: float = math.inf
    tpot_s: float = math.inf
    on_miss: OnMiss = "demote"
    priority: int = 0
    weight: float = 1.0
    service_class: str = ""
    tenant: str = ""
    client: str = ""
    output: RunOutput = "logits"
    decodes: bool = True
    is_promised: bool = False

    def __post_init__(self) -> None:
        if self.prompt_tokens < 0 or self.context_tokens < 0:
            raise ValueError(
                f"job {self.id}: prompt_tokens {self.prompt_tokens} and context_tokens "
                f"{self.context_tokens} must be 0 or more"
            )
        if math.isnan(self.ttft_deadline_s) or not self.tpot_s > 0 or math.isnan(self.arrival_s):
            raise ValueError(
                f"job {self.id}: arrival_s {self.arrival_s}, ttft_deadline_s "
                f"{self.ttft_deadline_s}, tpot_s {self.tpot_s}: expected numbers, tpot_s > 0"
            )
        if not 0 < self.weight < math.inf:
            raise ValueError(f"job {self.id}: weight {self.weight}, expected a number > 0")

    @property
    def head_rows(self) -> int:
        """Rows of its prefill that the output head computes."""
        if self.output == "logits":
            return 1
        return 1 + self.prompt_tokens if self.output == "scores" else 0
