"""Python view of the native module (csrc/bindings). Times are seconds on the monotonic clock."""

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from typing import Literal, TypeAlias, TypedDict

import numpy as np
import numpy.typing as npt

from flowprefill.models.graph import ModelGraph

Int32Array: TypeAlias = npt.NDArray[np.int32]
FloatArray: TypeAlias = npt.NDArray[np.float32]
RunState: TypeAlias = Literal["ready", "running", "suspended", "finished", "cancelled", "failed"]
# product_flops, weight_bytes, attention_flops, cache_bytes, other_s, seconds, segments
OperatorTuple: TypeAlias = tuple[float, float, float, float, float, float, int]
RunEventKind: TypeAlias = Literal["suspended", "finished", "cancelled", "failed"]

class MachineRates:
    """How fast this machine runs this model, for the planner; each > 0."""

    def __init__(
        self,
        *,
        gemm_flops_per_s: float,
        attention_flops_per_s: float,
        weight_bytes_per_s: float,
        step_overhead_s: float = ...,  # of one step of a segment
        cache_bytes_per_s: float | None = None,  # None: as fast as weights
    ) -> None: ...
    @property
    def gemm_flops_per_s(self) -> float: ...
    @property
    def attention_flops_per_s(self) -> float: ...
    @property
    def weight_bytes_per_s(self) -> float: ...
    @property
    def step_overhead_s(self) -> float: ...
    @property
    def cache_bytes_per_s(self) -> float: ...

class PlanOptions:
    """How runs are cut into segments."""

    def __init__(
        self,
        *,
        granularity: str,  # none, layer, operator, chunk, budget
        rates: MachineRates,
        budget_s: float = ...,  # longest wanted segment, of budget
        chunk_tokens: int = ...,  # of chunk
    ) -> None: ...
    @property
    def rates(self) -> MachineRates: ...
    @property
    def budget_s(self) -> float: ...
    @property
    def chunk_tokens(self) -> int: ...

class BatchSequence:
    """One request's part of a batch: new rows, tokens in the cache before them, KV blocks."""

    def __init__(
        self,
        *,
        rows: int,
        context: int,
        block_table: Int32Array,
        next_token: int = -1,  # that follows the last row, for its score; -1: not known
    ) -> None: ...

class Batch:
    """What one run computes: the sequences' new tokens, packed in their order."""

    def __init__(self, tokens: Int32Array, sequences: list[BatchSequence]) -> None: ...

class DeviceSampling:
    """How a run chooses the next token of one sequence."""

    def __init__(
        self,
        *,
        temperature: float,  # 0: the most likely token, whatever the rest says
        top_k: int,  # 0: all
        top_p: float,
        min_p: float,
        uniform: float,  # the random number, in [0, 1)
    ) -> None: ...

class RunAccounting:
    """Where a run's time went; exact once its terminal event was taken. 0: has not happened."""

    @property
    def dispatched_s(self) -> float: ...  # last dispatch
    @property
    def first_start_s(self) -> float: ...
    @property
    def last_end_s(self) -> float: ...
    @property
    def running_s(self) -> float: ...
    @property
    def suspended_s(self) -> float: ...
    @property
    def max_blocking_s(self) -> float: ...
    @property
    def num_preemptions(self) -> int: ...

class ExecutorStats:
    """Counts since the start."""

    @property
    def num_segments(self) -> int: ...
    @property
    def num_suspended(self) -> int: ...
    @property
    def num_failed(self) -> int: ...
    @property
    def max_blocking_s(self) -> float: ...

class SegmentLabel:
    """What one segment covers."""

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

class TimelineRecord:
    """One executed segment."""

    @property
    def run_id(self) -> int: ...
    @property
    def segment(self) -> int: ...
    @property
    def label(self) -> SegmentLabel: ...
    @property
    def start_s(self) -> float: ...
    @property
    def end_s(self) -> float: ...

class TimelineSnapshot:
    """The ring's records from `since` on; `records` makes a new list each time."""

    @property
    def records(self) -> list[TimelineRecord]: ...
    @property
    def next(self) -> int: ...  # the `since` of the next call

class RunEvent:
    """What happened to a run, and at which of its segments."""

    @property
    def kind(self) -> RunEventKind: ...
    @property
    def run(self) -> Run: ...
    @property
    def cursor(self) -> int: ...
    @property
    def time_s(self) -> float: ...

class Run:
    """One execution of a program. Readable from any thread."""

    @property
    def id(self) -> int: ...
    @property
    def state(self) -> RunState: ...
    @property
    def cursor(self) -> int: ...
    @property
    def num_segments(self) -> int: ...
    @property
    def error(self) -> str: ...
    @property
    def remaining_s(self) -> float: ...
    @property
    def live_bytes(self) -> int: ...
    def accounting(self) -> RunAccounting: ...
    def labels(self) -> list[SegmentLabel]: ...

class Executor:
    """The thread that owns the device. dispatch, cancel and suspend never wait."""

    def __init__(self, threads: int, background: bool = False) -> None: ...
    def start(self) -> None: ...
    def stop(self) -> None: ...
    def dispatch(self, run: Run | None) -> Run | None: ...
    def cancel(self, run: Run) -> bool: ...
    def suspend(self, run: Run) -> bool: ...
    def pop_events(self) -> list[RunEvent]: ...
    def timeline(self, since: int = 0) -> TimelineSnapshot: ...
    def operator_times(self, run: Run, rates: MachineRates) -> list[OperatorTuple]: ...
    def stats(self) -> ExecutorStats: ...
    @property
    def event_fd(self) -> int: ...
    @property
    def num_regions(self) -> int: ...  # loops that its threads have shared out

class Model:
    """A model's packed weights and its KV cache."""

    def __init__(
        self,
        graph: ModelGraph,
        dtype: str,
        threads: int,
        quantization: str = ...,
        formats: Mapping[str, str] = ...,  # tensors that come by load_blocks: GGUF's type
    ) -> None: ...
    def load(self, name: str, values: FloatArray) -> None: ...
    def load_blocks(self, name: str, rows: npt.NDArray[np.uint8]) -> None: ...
    def finish(self) -> None: ...
    def allocate_cache(self, block_tokens: int, blocks: int) -> None: ...
    def bytes_per_block(self, block_tokens: int) -> int: ...
    def zero_blocks(self, blocks: list[int]) -> None: ...
    def make_run(
        self,
        id: int,
        batch: Batch,
        plan: PlanOptions,
        *,
        fail_at: int = -1,  # tests: this segment throws
        pause_at: AbstractSet[int] = ...,  # tests: suspended before these segments
        sampling: list[DeviceSampling] = ...,  # empty: no tokens are chosen
        fetch_logits: bool = True,
        output: Literal["logits", "scores", "last", "mean"] = "logits",
    ) -> Run: ...
    @property
    def weight_bytes(self) -> int: ...

class CutRules:
    """Where a device wants its cuts (csrc/graph/planner.h)."""

    def __init__(
        self,
        *,
        row_step: int = ...,  # rows of a slice of attention are a multiple of it
        max_tile_rows: int = ...,  # rows that go through a layer together
        min_tile_rows: int = ...,
        min_product_parts: int = ...,
        attention_slices: Literal["rows", "heads_first", "rows_first"] = ...,  # heads: of KV
        slices_products: bool = ...,  # products of a tile by parts; else tiles have fewer rows
        embed_rows: int = ...,  # rows of a step before the layers
        weight_element_bytes: int = ...,
        embed_row_s: float = ...,
    ) -> None: ...

class PlanPredictor:
    """The planner alone: no weights, no device. Thread: any."""

    def __init__(self, graph: ModelGraph, cuts: CutRules) -> None: ...
    def segments(self, rows: int, context: int, plan: PlanOptions) -> npt.NDArray[np.float64]: ...

def spin_run(id: int, segments: int, segment_s: float, fail_at: int = -1) -> Run: ...
def cpu_cuts(
    dtype: str, threads: int, quantization: str = ...
) -> CutRules: ...  # of a model on the CPU
def cuda_cuts() -> CutRules: ...  # of a model on a GPU
def has_logits(run: Run) -> bool: ...  # False: made with fetch_logits=False
def logits(run: Run) -> FloatArray: ...
def sampled(run: Run) -> Int32Array: ...  # [sequences], -1: none to choose; empty: made without
def scores(run: Run) -> Int32Array: ...  # [rows, 43], as csrc/graph/prompt_score.h has them
def embeddings(run: Run) -> FloatArray: ...  # [sequences, hidden]
def live_workspace_bytes() -> int: ...

block_formats: tuple[str, ...]  # GGUF's types that stay in their blocks

def has_bf16_gemm() -> bool: ...  # natively, with the instruction set in use
def has_int8_gemm() -> bool: ...  # the same of bytes
def isa() -> str:
    """Return the instruction set in use; raises ValueError if FLOWPREFILL_ISA names none."""

def available_isas() -> list[str]:
    """Return those that this processor has, least first."""

class Ceilings(TypedDict):
    f32: float  # operations per second
    bf16: float
    int8: float  # 0: no instruction
    reads: list[tuple[int, float]]  # bytes read over and over, bytes per second

def measure_ceilings(threads: int) -> Ceilings: ...
def now_s() -> float: ...
