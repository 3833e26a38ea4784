"""Python view of the native module for GPUs (csrc/bindings/cuda_module.cc); absent in CPU builds.

Importing it needs no driver. Runs belong to the module that made them: those of ``_core`` are a
TypeError here. Times are seconds on the monotonic clock; CUDA's errors are RuntimeErrors that name
call, code, operator and layer.
"""

from collections.abc import Set as AbstractSet
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

# The module has its own classes of these names; they are the same plain values.
from flowprefill._core import Batch as Batch
from flowprefill._core import BatchSequence as BatchSequence
from flowprefill._core import DeviceSampling as DeviceSampling
from flowprefill._core import ExecutorStats as ExecutorStats
from flowprefill._core import MachineRates as MachineRates
from flowprefill._core import OperatorTuple, RunEventKind, RunState
from flowprefill._core import PlanOptions as PlanOptions
from flowprefill._core import RunAccounting as RunAccounting
from flowprefill._core import SegmentLabel as SegmentLabel
from flowprefill._core import TimelineRecord as TimelineRecord
from flowprefill._core import TimelineSnapshot as TimelineSnapshot
from flowprefill.models.graph import ModelGraph

Int32Array: TypeAlias = npt.NDArray[np.int32]
FloatArray: TypeAlias = npt.NDArray[np.float32]
# rows, columns, depth, output and epilogue, the kernel chosen, {kernel: microseconds or why not}
GemmReport: TypeAlias = tuple[int, int, int, str, str, dict[str, float | str]]

architectures: str  # what the kernels were compiled for, as CMake names them

def device_count() -> int:
    """Return how many GPUs the driver shows; 0 without a driver."""

def availability(device: int = 0) -> tuple[bool, str]:
    """Return whether this GPU can be used; its name, or exactly what is missing."""

def device_info(device: int = 0) -> dict[str, Any]:
    """Return name, compute_capability, multiprocessors, memory_bytes, free_bytes and versions."""

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

class Executor:
    """The thread that launches on the device. dispatch, cancel and suspend never wait."""

    # Once per model; allocate_cache() comes first. plan: graphs of runs with these options are
    # captured by start(), which also measures kernels if the model's options say so.
    def __init__(self, model: Model, plan: PlanOptions | None = None) -> None: ...
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

class Model:
    """A model's weights, in bf16 or FP8, and its KV cache, both in the memory of one GPU."""

    # options: fields of CudaBackendOptions (csrc/devices/cuda/backend) by name
    def __init__(self, graph: ModelGraph, options: dict[str, Any] = ...) -> None: ...
    # Another model with these weights, which are finished; its lanes and options are its own.
    def sharing_weights(self, options: dict[str, Any] = ...) -> Model: ...
    def load(self, name: str, values: FloatArray) -> None: ...
    # Of fp8_sources among the options: [rows, columns + 4] e4m3 codes, then a float, their scale.
    def load_blocks(self, name: str, rows: npt.NDArray[np.uint8]) -> None: ...
    def finish(self) -> None: ...
    def allocate_cache(self, block_tokens: int, blocks: int) -> None: ...
    def bytes_per_block(self, block_tokens: int) -> int: ...
    def lane_bytes(self, block_tokens: int) -> int: ...  # allocate_cache takes them too
    def zero_blocks(self, blocks: list[int]) -> None: ...
    def make_run(
        self,
        id: int,
        batch: Batch,
        plan: PlanOptions,
        *,
        fail_at: int = -1,  # tests: this segment throws
        pause_at: AbstractSet[int] = ...,  # tests: suspended before these segments
        sampling: list[DeviceSampling] = ...,  # empty: the most likely tokens
        fetch_logits: bool = True,
        output: Literal["logits", "scores", "last", "mean"] = "logits",
    ) -> Run: ...
    def graph_report(self) -> dict[str, Any]: ...
    def lane_report(self) -> dict[str, Any]: ...
    def gemm_report(self) -> list[GemmReport]: ...
    @property
    def library_failure(self) -> str: ...  # why cuBLASLt is not used; empty: it is
    @property
    def gemm_cache_failure(self) -> str: ...  # why measured choices were not kept; empty: they were
    @property
    def weight_bytes(self) -> int: ...

def spin_run(id: int, segments: int, segment_s: float, fail_at: int = -1) -> Run: ...
def has_logits(run: Run) -> bool: ...  # False: made with fetch_logits=False
def logits(run: Run) -> FloatArray: ...
def scores(run: Run) -> Int32Array: ...  # [rows, 43], as csrc/graph/prompt_score.h has them
def embeddings(run: Run) -> FloatArray: ...  # [sequences, hidden]
def sampled(run: Run) -> Int32Array: ...
def bucket(run: Run) -> int: ...  # tokens it is padded to; 0: exact size
def now_s() -> float: ...
