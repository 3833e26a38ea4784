"""Breaks csrc/cuda in known ways, one at a time: the tests over the double must notice each.

`make test-cuda-mutants` runs it. Works on a copy under build/, prints a table, exits 1 if a mutant
survives. `mutants.py NAME...` tries only these. A mutant whose text is no longer found is an error:
renew it here.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
WORK = ROOT / "build" / "cuda-mutants"
COPIED = ("cmake", "csrc/cuda", "csrc/model", "csrc/runtime", "tests/cpp")
TEST_TIMEOUT_S = 120


@dataclass(frozen=True)
class Mutant:
    """One wrong edit: `old`, found exactly once in `file`, becomes `new`."""

    name: str
    file: str
    old: str
    new: str

    @property
    def tests(self) -> str:
        """The tests that have to notice, as GoogleTest filters them."""
        is_model = self.file.startswith("csrc/cuda/model/")
        return "*Model*:-*fault_at_every*" if is_model else "*:-*Model*"


DEVICE = "csrc/cuda/cuda_device.cc"
LANES = "csrc/cuda/lane_pool.cc"
CACHE = "csrc/cuda/graph_cache.cc"
PROGRAM = "csrc/cuda/cuda_program.cc"
GRAPH = "csrc/cuda/graph.cc"
EXECUTOR = "csrc/runtime/executor.cc"
SHAPE = "csrc/cuda/model/plan_shape.cc"
INPUTS = "csrc/cuda/model/batch_inputs.cc"
BUILDER = "csrc/cuda/model/plan_builder.cc"
WEIGHTS = "csrc/cuda/model/device_weights.cc"
KERNELS = "csrc/cuda/model/layer_kernels.cc"
MODEL = "csrc/cuda/model/cuda_model.cc"

MUTANTS = (
    Mutant(
        "end of a segment is not recorded",
        DEVICE,
        "  slot.end.record(resources_->stream(), slot.context);\n",
        "",
    ),
    Mutant(
        "run-ahead of one more",
        DEVICE,
        "> static_cast<size_t>(options_.run_ahead)",
        "> static_cast<size_t>(options_.run_ahead) + 1",
    ),
    Mutant(
        "run-ahead of one less",
        DEVICE,
        "> static_cast<size_t>(options_.run_ahead)",
        "> static_cast<size_t>(options_.run_ahead) - 1",
    ),
    Mutant(
        "capture mode of the thread stays",
        DEVICE,
        "mode = cudaStreamCaptureModeRelaxed",
        "mode = cudaStreamCaptureModeGlobal",
    ),
    Mutant(
        "drain waits for nothing",
        DEVICE,
        "while (!is_broken_ && num_done_ < num_launched_)",
        "num_done_ = num_launched_;\n  while (!is_broken_ && num_done_ < num_launched_)",
    ),
    Mutant("failure is not drained", DEVICE, "  resources_->synchronize();\n", ""),
    Mutant(
        "clock goes on after a failure",
        DEVICE,
        "  clock_->forget();\n",
        "",
    ),
    Mutant(
        "error of a launch is not charged to its operator",
        DEVICE,
        "throw error.charged_to(next.context);",
        "throw;",
    ),
    Mutant(
        "CUDA's record of an error stays",
        "csrc/cuda/cuda_error.cc",
        "static_cast<void>(cudaGetLastError());",
        "return;",
    ),
    Mutant(
        "capture is left open by an exception",
        GRAPH,
        "    ignore(cudaStreamEndCapture(stream, &graph));\n",
        "",
    ),
    Mutant("graph of an abandoned capture leaks", GRAPH, "    const Graph dropped(graph);\n", ""),
    Mutant(
        "capture in global mode",
        GRAPH,
        "cudaStreamCaptureModeThreadLocal",
        "cudaStreamCaptureModeGlobal",
    ),
    Mutant(
        "failed capture is tried again each time",
        CACHE,
        "  entry.is_refused = true;\n",
        "",
    ),
    Mutant(
        "anything is evicted for a newcomer",
        CACHE,
        "if (entry.exec && entry.last_request < previous_request)",
        "if (entry.exec)",
    ),
    Mutant(
        "smallest bucket is warmed first",
        CACHE,
        "std::tuple(-request.key.bucket",
        "std::tuple(request.key.bucket",
    ),
    Mutant(
        "memory of executables is not bounded",
        CACHE,
        "&& bytes_left + bytes <= options_.max_bytes",
        "",
    ),
    Mutant("lanes share executables", PROGRAM, ".lane = lane.index};", ".lane = 0};"),
    Mutant(
        "inputs of one run are frozen into graphs",
        PROGRAM,
        "  if (may_capture(*plan_, segment)) {\n",
        "  args.host_inputs = inputs_;\n  if (may_capture(*plan_, segment)) {\n",
    ),
    Mutant("result is not fetched", PROGRAM, "      fetch_result(lane, context);\n", "      ;\n"),
    Mutant(
        "live set of the boundary before",
        PROGRAM,
        "tenant_.keep(&plan_->live(i + 1));",
        "tenant_.keep(&plan_->live(i));",
    ),
    Mutant(
        "everything ever written stays live",
        "csrc/cuda/live_set.cc",
        "live[i + 1].without(segments[i].writes)",
        "live[i + 1]",
    ),
    Mutant(
        "inputs are not copied again",
        LANES,
        "if (!tenant.inputs_.empty()) {",
        "if (!tenant.inputs_.empty() && tenant.spill_.empty()) {",
    ),
    Mutant(
        "spilled ranges lie on one another",
        LANES,
        "    stored += range.bytes;\n",
        "",
    ),
    Mutant(
        "latest tenant is spilled",
        LANES,
        "std::ranges::min_element(lanes_",
        "std::ranges::max_element(lanes_",
    ),
    Mutant(
        "spill that failed loses the victim's lane",
        LANES,
        "    } catch (...) {\n      garbage_.splice",
        "    } catch (...) {\n      victim.lane_ = -1;\n"
        "      lane.tenant = nullptr;\n      garbage_.splice",
    ),
    Mutant(
        "spill storage is never given back",
        LANES,
        "  stream_ = stream;\n  empty_garbage(stream);\n",
        "  stream_ = stream;\n",
    ),
    Mutant(
        "no spill to the host when the device is full",
        LANES,
        "      if (!error.is_out_of_memory())\n        throw;\n",
        "      throw;\n",
    ),
    Mutant(
        "pinned memory leaks",
        "csrc/cuda/memory.cc",
        "    ignore(cudaFreeHost(memory));\n",
        "    static_cast<void>(memory);\n",
    ),
    Mutant(
        "padding of exactly the ratio goes eager",
        "csrc/cuda/bucket.cc",
        "*bucket > max_padding * tokens",
        "*bucket >= max_padding * tokens",
    ),
    Mutant(
        "flag between segments is not read",
        EXECUTOR,
        "  if (mailbox_.has_mail()) [[unlikely]] {\n",
        "  if (false) {\n",
    ),
    Mutant(
        "times of a failed run's segments go to the next run",
        EXECUTOR,
        "  in_flight_.clear();  // what is left did not complete\n",
        "",
    ),
    Mutant(
        "down projection does not keep its input",
        SHAPE,
        "{.reads = LiveSet({r.gated(), r.hidden()})",
        "{.reads = LiveSet({r.hidden()})",
    ),
    Mutant(
        "rotary table is not kept",
        SHAPE,
        "{.reads = LiveSet({r.qkv(), r.rotary()})",
        "{.reads = LiveSet({r.qkv()})",
    ),
    Mutant(
        "residual stream is not kept over attention",
        SHAPE,
        "{.reads = LiveSet({r.context(), r.hidden()})",
        "{.reads = LiveSet({r.context()})",
    ),
    Mutant(
        "tile's rows are counted from the batch's first",
        SHAPE,
        "product(step_.row_begin - step_.base, row_bytes, 1)",
        "product(step_.row_begin, row_bytes, 1)",
    ),
    Mutant(
        "gated lies on normed", SHAPE, "  gated = lane.take(", "  gated = normed;\n  lane.take("
    ),
    Mutant(
        "padding of the last rows is row 0",
        INPUTS,
        "out.put(layout.last_rows, i, int32_t{-1});",
        "out.put(layout.last_rows, i, int32_t{0});",
    ),
    Mutant(
        "first sequence is taken for padding",
        INPUTS,
        "static_cast<int32_t>(i) + 1);",
        "static_cast<int32_t>(i));",
    ),
    Mutant(
        "positions start anew in a continued prompt",
        INPUTS,
        "out.put(layout.positions, at, s.context + row);",
        "out.put(layout.positions, at, row);",
    ),
    Mutant(
        "a slice attends from the start of its sequence",
        INPUTS,
        ".position = s.context + begin - s.row_begin,",
        ".position = s.context,",
    ),
    Mutant("slice's rows are the batch's", INPUTS, ".row = begin - rows.base,", ".row = begin,"),
    Mutant(
        "last tile of attention is left out",
        INPUTS,
        "tiles, tiles.size());",
        "tiles, tiles.size() - (tiles.empty() ? 0 : 1));",
    ),
    Mutant(
        "plans of other shapes share graphs",
        BUILDER,
        "variants_.emplace(std::pair(shape.sizes, shape.attention), next).first->second;",
        "variants_.emplace(std::pair(shape.sizes, shape.attention), next).first->second * 0;",
    ),
    Mutant("padding is taken at any price", BUILDER, "padding_s <= launch_s && ", ""),
    Mutant(
        "budget is overrun on long contexts",
        BUILDER,
        "    if (predicted_s[i] > PlanBuilder::kMaxOverrun * allowed_s)\n      return true;\n",
        "    static_cast<void>(allowed_s);\n",
    ),
    Mutant(
        "all rows are kept for the final norm of an exact plan",
        BUILDER,
        "build(sizes, std::move(steps), 0, last_rows_of(batch))",
        "build(sizes, std::move(steps), 0, {})",
    ),
    Mutant(
        "up comes before gate",
        WEIGHTS,
        'add(layer + "gate", w.gate_up, inner, hidden, 2 * hidden);\n'
        '  add(layer + "up", w.gate_up + hidden,',
        'add(layer + "up", w.gate_up, inner, hidden, 2 * hidden);\n'
        '  add(layer + "gate", w.gate_up + hidden,',
    ),
    Mutant(
        "bias of the keys overwrites that of the queries",
        WEIGHTS,
        'add(layer + "k_bias", w.qkv_bias + q,',
        'add(layer + "k_bias", w.qkv_bias,',
    ),
    Mutant(
        "layers share the cache",
        "csrc/cuda/model/device_kv_cache.cc",
        "index * (2 * half) * blocks_",
        "0 * index",
    ),
    Mutant(
        "slices of the head are written on one another",
        KERNELS,
        "f32(at.logits, 0, 0) + begin, end - begin);",
        "f32(at.logits, 0, 0), end - begin);",
    ),
    Mutant(
        "window of the first layer everywhere",
        KERNELS,
        "c_.windows[static_cast<size_t>(call.step.layer)]",
        "c_.windows[0]",
    ),
    Mutant(
        "rows of padding are fetched as tokens",
        MODEL,
        "ranges.push_back({lane.tokens, count * sizeof(int32_t)});",
        "ranges.push_back({lane.tokens + sizeof(int32_t) * (static_cast<size_t>("
        "plan_->shape->sizes.sequences) - count), count * sizeof(int32_t)});",
    ),
)


def make_copy() -> None:
    """Copy the sources; files that did not change keep their time, so that little is rebuilt."""
    for folder in COPIED:
        for source in sorted((ROOT / folder).rglob("*")):
            target = WORK / "src" / source.relative_to(ROOT)
            if source.is_dir():
                target.mkdir(parents=True, exist_ok=True)
            elif not target.exists() or target.read_bytes() != source.read_bytes():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)


def cuda_headers() -> list[str]:
    """Name the headers of .venv, if they are there: CMake looks beside the copied sources."""
    found = ROOT.glob(".venv/lib/python3*/site-packages/nvidia/cu13/include/cuda_runtime_api.h")
    return [f"-DCUDA_INCLUDE_DIR={header.parent}" for header in found][:1]


def run(*command: str | Path, timeout_s: float | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def build() -> str:
    """Build the tests; return what the compiler said if it failed."""
    result = run("cmake", "--build", WORK / "build", "--target", "cuda_double_test")
    return "" if result.returncode == 0 else result.stdout + result.stderr


def test(tests: str) -> str:
    """Run these tests until the first failure; return its name, or nothing if all pass."""
    try:
        result = run(
            WORK / "build" / "cuda_double_test",
            "--gtest_brief=1",
            "--gtest_fail_fast",
            f"--gtest_filter={tests}",
            timeout_s=TEST_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return "time limit"
    if result.returncode == 0:
        return ""
    failed = [line for line in result.stdout.splitlines() if line.startswith("[  FAILED  ] ")]
    return failed[0].split()[3] if failed else f"crash (exit status {result.returncode})"


def try_mutant(mutant: Mutant) -> str:
    """Return how the mutant died, or nothing if it lives."""
    path = WORK / "src" / mutant.file
    original = path.read_text()
    if original.count(mutant.old) != 1:
        sys.exit(f"{mutant.name}: text found {original.count(mutant.old)} times in {mutant.file}")
    path.write_text(original.replace(mutant.old, mutant.new))
    try:
        error = build()
        if error:
            sys.exit(f"{mutant.name}: does not compile, so it shows nothing\n{error}")
        return test(mutant.tests)
    finally:
        path.write_text(original)


def main() -> int:
    wanted = set(sys.argv[1:])
    mutants = [m for m in MUTANTS if not wanted or m.name in wanted]
    start = time.monotonic()
    make_copy()
    configured = run(
        "cmake", "-S", WORK / "src" / "tests" / "cpp" / "cuda", "-B", WORK / "build", "-G", "Ninja",
        "-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS_DEBUG=-O1", *cuda_headers(),
    )  # fmt: skip
    error = configured.stderr if configured.returncode else build()
    if error:
        sys.exit(error)
    if failure := test("*"):
        sys.exit(f"the tests fail without any mutant: {failure}")
    survivors = 0
    print(f"{'mutant':58} killed by")
    for mutant in mutants:
        death = try_mutant(mutant)
        survivors += not death
        print(f"{mutant.name:58} {death or 'SURVIVED'}", flush=True)
    print(
        f"{len(mutants) - survivors} of {len(mutants)} killed in {time.monotonic() - start:.0f} s"
    )
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
