"""ActiveRun: a run in or near the executor, the work it stands for, the sequences it computes."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Protocol

from flowprefill.errors import FlowPrefillError, RequestFailed

if TYPE_CHECKING:
    from flowprefill.engine.device import FloatArray, NativeRun
    from flowprefill.engine.sequence import Sequence
    from flowprefill.scheduling import Work


class RunMaker(Protocol):
    """What the core needs of the model."""

    def make_run(self, run_id: int, sequences: list[Sequence]) -> NativeRun:
        """Build the run that computes the not yet computed tokens of the sequences."""

    def outcomes(self, run: NativeRun) -> FloatArray | list[int]:
        """Return a finished run's logits, [sequences, vocab], or the tokens the device chose."""

    def zero_blocks(self, blocks: list[int]) -> None:
        """Clear KV blocks whose content must not be read again."""


class ActiveRun:
    """One live run; the engine's core keeps it until the run's terminal event.

    Attributes:
        sequences: in the order of the run's rows of logits.
        computed: tokens of each sequence that are in the cache once the run has finished.
        is_preempting: it was dispatched over another run; `reason` says why.
    """

    __slots__ = ("computed", "is_preempting", "reason", "run", "sequences", "work")

    def __init__(self, work: Work, run: NativeRun, sequences: list[Sequence]) -> None:
        self.work = work
        self.run = run
        self.sequences = sequences
        self.computed = [len(sequence.ids) for sequence in sequences]
        self.is_preempting = False
        self.reason = ""

    @property
    def name(self) -> str:
        """What the timeline calls it."""
        if self.work.kind == "prefill" and len(self.sequences) == 1:
            return f"prefill {self.sequences[0].id}"
        return f"{self.work.kind} of {len(self.sequences)}"

    @property
    def blocking_s(self) -> float:
        """Longest time from one of its dispatches to its next segment, seconds."""
        return float(self.run.accounting()["max_blocking_s"])

    def sample(self, outcomes: FloatArray | list[int]) -> dict[str, FlowPrefillError]:
        """Sample a token for each sequence of the finished run and hand it to its reader.

        Args:
            outcomes: the run's logits, [sequences, vocab], or the tokens the device chose.

        Returns:
            Errors of those that failed, by request id. One request's bad logits do not end others.

        Thread: the event thread, without the engine's lock.
        """
        failures: dict[str, FlowPrefillError] = {}
        for row, sequence in enumerate(self.sequences):
            if sequence.error is not None:
                continue
            try:
                token = sequence.advance(outcomes[row], time.monotonic())
            except Exception as error:
                failures[sequence.id] = RequestFailed(f"request {sequence.id}: {error}")
                continue
            sequence.handle.push(token)
        return failures

    def account(self) -> None:
        """Note in the sequences where the time of their first prefill went."""
        if self.work.kind == "decode":
            return
        accounting = self.run.accounting()
        for sequence in self.sequences:
            if sequence.queue_s is None and accounting["first_start_s"] > 0:
                sequence.queue_s = max(accounting["first_start_s"] - sequence.arrival_s, 0.0)
                sequence.prefill_run_s = accounting["running_s"]
                sequence.suspended_s = accounting["suspended_s"]
                sequence.preemptions = accounting["num_preemptions"]
                sequence.blocking_s = accounting["max_blocking_s"]
