"""Worker: one model on one device, as the engine and its core see it, and the data they exchange.

LocalWorker (local_worker.py) implements it on this machine's devices. Nothing here is native and
nothing reads a clock but `Worker.now_s`, so a worker may as well be simulated or be elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from flowprefill.scheduling.operator_rates import NONE

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from flowprefill.config import Granularity
    from flowprefill.engine.sampler import DeviceSampling
    from flowprefill.request import RunOutput
    from flowprefill.scheduling import MachineRates, ModelShape
    from flowprefill.scheduling.operator_rates import Corrections, OperatorTime

    Logits = npt.NDArray[np.float32]
    Scores = npt.NDArray[Any]

# From here on ids are of runs that the worker makes for itself, to calibrate.
FIRST_PROBE_RUN = 1 << 62

RunState = Literal["ready", "running", "suspended", "finished", "cancelled", "failed"]
RunEventKind = Literal["suspended", "finished", "cancelled", "failed"]


@dataclass(frozen=True, slots=True)
class WorkerLimits:
    """What a worker can hold.

    Attributes:
        max_model_len: longest prompt plus output, tokens.
        block_tokens: tokens of one KV block.
        num_blocks: KV blocks; they are numbered from 0.
        chooses_tokens: whether its runs can choose the next tokens themselves; see
            `BatchSequence.sampling`.
        max_running: most sequences in one decode step.
    """

    max_model_len: int
    block_tokens: int
    num_blocks: int
    chooses_tokens: bool
    max_running: int = 64


@dataclass(frozen=True, slots=True)
class BatchSequence:
    """What one run computes of one request.

    Attributes:
        tokens: the new ones, at least one.
        context: tokens whose keys and values are in the cache already.
        blocks: its KV blocks in order, int32, room for context and new tokens.
        sampling: how the device may choose the next token; None: it gives the logits.
    """

    tokens: list[int]
    context: int
    blocks: npt.NDArray[np.int32]
    sampling: DeviceSampling | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """What one run computes: new tokens of one or more requests.

    Attributes:
        run_id: unique for the life of the worker, below FIRST_PROBE_RUN.
        corrections: true over calibrated time of operators; segments are cut by it.
        output: what the run has to give, one of the worker's outputs.
    """

    run_id: int
    sequences: list[BatchSequence]
    corrections: Corrections = NONE
    output: RunOutput = "logits"


class RunAccounting(Protocol):
    """Where a run's time went, seconds; exact once its terminal event was taken."""

    @property
    def first_start_s(self) -> float: ...  # on the worker's clock; 0: has not started
    @property
    def running_s(self) -> float: ...
    @property
    def suspended_s(self) -> float: ...
    @property
    def max_blocking_s(self) -> float: ...  # longest from a dispatch to the next segment's start
    @property
    def num_preemptions(self) -> int: ...


class RunHandle(Protocol):
    """One run; its worker made it and takes it back. Readable from any thread.

    Attributes:
        error: why it failed, naming operator and layer; empty unless it has.
    """

    @property
    def id(self) -> int: ...
    @property
    def state(self) -> RunState: ...
    @property
    def error(self) -> str: ...
    def accounting(self) -> RunAccounting: ...


class RunEvent(Protocol):
    """What happened to a run. No event of a run follows its terminal one."""

    @property
    def kind(self) -> RunEventKind: ...
    @property
    def run(self) -> RunHandle: ...
    @property
    def time_s(self) -> float: ...


class SegmentLabel(Protocol):
    """What one segment covers: operators of layers [layer, last_layer], rows [begin, end)."""

    @property
    def op(self) -> str: ...  # the first operator's name
    @property
    def layer(self) -> int: ...  # -1: outside of the layers
    @property
    def last_layer(self) -> int: ...
    @property
    def row_begin(self) -> int: ...
    @property
    def row_end(self) -> int: ...
    @property
    def predicted_s(self) -> float: ...


class TimelineRecord(Protocol):
    """One executed segment; times on the worker's clock."""

    @property
    def run_id(self) -> int: ...
    @property
    def segment(self) -> int: ...  # its place in the run
    @property
    def label(self) -> SegmentLabel: ...
    @property
    def start_s(self) -> float: ...
    @property
    def end_s(self) -> float: ...


@dataclass(frozen=True, slots=True)
class WorkerStats:
    """Counts since the start, and what is held now.

    Attributes:
        preemptions: how many times a run was suspended.
        workspace_bytes: activations of all live runs.
        max_blocking_s: longest time from a dispatch to its first segment.
    """

    preemptions: int
    segments: int
    workspace_bytes: int
    max_blocking_s: float


class Worker(Protocol):
    """Executes one run at a time, segment by segment; suspends it between two.

    Thread: `poll` from one thread, `start` and `stop` from one each; the rest from any. Only
    `poll`, `start` and `stop` wait.

    Attributes:
        limits: constant.
        shape: what the model asks of the machine.
        rates: the machine's speed as `start` measured it; None: not measured.
        granularity: how prefills are cut.
    """

    limits: WorkerLimits
    shape: ModelShape
    rates: MachineRates | None
    granularity: Granularity

    def start(self) -> None:
        """Begin to execute, and measure the machine if the settings say so."""

    def stop(self) -> None:
        """Cancel what runs and end; no other call may follow but `stats` and `timeline`."""

    def now_s(self) -> float:
        """Return the time on the clock of all deadlines, arrivals and accounts, seconds."""

    def make_run(self, batch: Batch) -> RunHandle:
        """Build a run; it does not start.

        Raises:
            Exception: whatever makes that impossible; nothing has changed then.
        """

    def dispatch(self, run: RunHandle) -> bool:
        """Execute this run next, from where it stands; the current one is suspended first.

        Dispatching the current run takes back a `suspend`.

        Returns:
            False: it has ended already, its event is on the way or was taken.
        """

    def suspend(self, run: RunHandle) -> bool:
        """Have the run stop at its next boundary. False, and nothing happens: it is not running."""

    def cancel(self, run: RunHandle) -> bool:
        """End the run: now, or at its next boundary. False: it has ended already."""

    def poll(self, until_s: float) -> list[RunEvent]:
        """Wait for events and take them, in order.

        Args:
            until_s: return with none at this time (inf: never), or when `wake` is called.
        """

    def wake(self) -> None:
        """Have `poll` return."""

    def logits(self, run: RunHandle) -> Logits:
        """Return a finished run's logits, [sequences, vocab], unless all its tokens were chosen."""

    def chosen(self, run: RunHandle) -> list[int]:
        """Return a finished run's next tokens, one of each sequence; below 0: none to choose.

        Those of sequences without `sampling` mean nothing.
        """

    def scores(self, run: RunHandle) -> Scores:
        """Return a finished run's scores, [tokens] of `prompt_logprobs.SCORE`; output scores."""

    def embeddings(self, run: RunHandle) -> Logits:
        """Return a finished run's embeddings, [sequences, hidden]; output last or mean."""

    def zero_blocks(self, blocks: list[int]) -> None:
        """Clear KV blocks whose content must not be read again."""

    def set_granularity(self, granularity: Granularity) -> None:
        """Cut the runs made from now on so."""

    def stats(self) -> WorkerStats:
        """Return counts and sizes."""

    def operator_times(self, run: RunHandle) -> Sequence[OperatorTime]:
        """Return what the segments of a finished run took, by kind of operator; none: not known.

        Segments that are too long ago are left out.
        """

    def timeline(self, since: int = 0) -> list[TimelineRecord]:
        """Return the segments executed last, oldest first; since: none before that many."""

    def describe(self) -> Mapping[str, Any]:
        """Return device, element type, granularity and why, in words."""
