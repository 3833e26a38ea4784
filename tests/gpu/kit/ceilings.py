"""What torch's libraries reach on this GPU on the shapes of Llama-3.1-8B; lines of tabs.

run.sh's stage "ceilings":  ceilings.py [BUDGET_S]
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from itertools import cycle

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import linear, scaled_dot_product_attention

DEVICE = "cuda"
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
LENGTHS = (2048, 8192, 32768)
BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash2": SDPBackend.FLASH_ATTENTION}
PRODUCTS = {  # columns, depth
    "qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336),
}  # fmt: skip
ROWS = (4096, 1024, 256, 1, 64, 2048, 8192)
COPIES = 4  # of the weights, taking turns: a layer finds its own in memory, not in cache


def say(section: str, what: str, *figures: object) -> None:
    """Print one line."""
    print(section, what, *figures, sep="\t", flush=True)


def us_of(call: Callable[[], object], rounds: int = 7) -> float:
    """Return the median device time of one call, us; a round takes a millisecond or more."""
    start = torch.cuda.Event(enable_timing=True)
    stop = torch.cuda.Event(enable_timing=True)

    def once(calls: int) -> float:
        start.record()
        for _ in range(calls):
            call()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) * 1e3 / calls

    once(1)
    calls = int(min(max(2000 / max(once(2), 1), 1), 200))
    return statistics.median(once(calls) for _ in range(rounds))


def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
    """Return random bf16 numbers."""
    return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16) * scale


def product(name: str, rows: int, columns: int, depth: int) -> None:
    """Measure one shape of product."""
    x = random(rows, depth)
    weights = cycle([random(columns, depth, scale=0.02) for _ in range(COPIES)])
    us = us_of(lambda: linear(x, next(weights)))
    flops, weight_bytes = 2 * rows * columns * depth, 2 * columns * depth
    rates = f"{flops / us / 1e6:.0f} TF/s", f"{weight_bytes / us / 1e3:.0f} GB/s"
    say("torch gemm", f"{name} x {rows}", f"{us:.1f} us", *rates)


def fp8_product(name: str, rows: int, columns: int, depth: int, is_fast: bool) -> None:
    """Measure e4m3 by e4m3 into bf16, with a scale for each row and column."""

    def codes(count: int) -> torch.Tensor:
        return random(count, depth, scale=60.0).to(torch.float8_e4m3fn)

    x, weights = codes(rows), cycle([codes(columns).t() for _ in range(COPIES)])
    scales = [torch.full(shape, 0.01, device=DEVICE) for shape in ((rows, 1), (1, columns))]

    def call() -> object:
        return torch._scaled_mm(
            x, next(weights), *scales, out_dtype=torch.bfloat16, use_fast_accum=is_fast
        )

    us = us_of(call)
    flops, weight_bytes = 2 * rows * columns * depth, columns * depth
    rates = f"{flops / us / 1e6:.0f} TF/s", f"{weight_bytes / us / 1e3:.0f} GB/s"
    how = ", fast sums" if is_fast else ""
    say("torch gemm", f"{name} x {rows}, fp8{how}", f"{us:.1f} us", *rates)


def products() -> None:
    """Measure cuBLAS."""
    for rows in ROWS:
        for name, (columns, depth) in PRODUCTS.items():
            product(name, rows, columns, depth)
    product("8192^3 ceiling", 8192, 8192, 8192)


def fp8_products() -> None:
    """Measure torch's products of FP8; where there are none the first says why."""
    if torch.cuda.get_device_capability() < (8, 9):
        say("torch gemm", "fp8", "left out: multiplied from compute capability 8.9 on")
        return
    for rows in ROWS:
        for name, (columns, depth) in PRODUCTS.items():
            fp8_product(name, rows, columns, depth, is_fast=False)
    for is_fast in (False, True):  # with sums of fewer bits, which ours never have
        fp8_product("8192^3 ceiling", 8192, 8192, 8192, is_fast)


def one_attention(name: str, length: int) -> None:
    """Measure causal attention over one prompt; a figure that is missing is told, not fatal."""
    q = random(1, HEADS, length, HEAD_DIM)
    k, v = (random(1, KV_HEADS, length, HEAD_DIM) for _ in range(2))
    what = f"{name} causal {length}"

    def call() -> object:
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    try:
        with sdpa_kernel(BACKENDS[name]):
            us = us_of(call, 5)
    except RuntimeError as error:
        say("torch attention", what, "FAILED " + str(error).splitlines()[0][:120])
        return
    flops = 4 * HEADS * HEAD_DIM * (length * (length + 1) / 2)
    say("torch attention", what, f"{us:.1f} us", f"{flops / us / 1e6:.0f} TFLOP/s")


def attention() -> None:
    """Measure cuDNN's and FlashAttention 2's."""
    for length in LENGTHS:
        for name in BACKENDS:
            one_attention(name, length)


def copies() -> None:
    """Measure the memory and the bus."""
    a = torch.empty(2 << 30, device=DEVICE, dtype=torch.uint8)
    b = torch.empty_like(a)
    us = us_of(lambda: b.copy_(a))
    rate = f"{2 * a.numel() / us / 1e3:.0f} GB/s read + written"
    say("torch copy", "2 GiB device to device", f"{us:.0f} us", rate)
    host = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
    us = us_of(lambda: a[: 1 << 30].copy_(host, non_blocking=True), 3)
    rate = f"{host.numel() / us / 1e3:.1f} GB/s"
    say("torch copy", "1 GiB pinned host to device", f"{us:.0f} us", rate)


def main() -> int:
    """Measure while there is time, or say why there is no GPU."""
    if not torch.cuda.is_available():
        print(f"no GPU: torch {torch.__version__} sees none")
        return 77
    until_s = time.monotonic() + (float(sys.argv[1]) if len(sys.argv) > 1 else 60.0)
    torch.manual_seed(0)
    cudnn = f"cudnn {torch.backends.cudnn.version()}"
    say("torch", torch.__version__, torch.version.cuda, torch.cuda.get_device_name(), cudnn)
    status = 0
    for part in (attention, copies, products, fp8_products):
        if time.monotonic() > until_s:
            say("torch", part.__name__, "left out: no time")
            continue
        try:
            part()
        except (RuntimeError, AttributeError) as error:
            say("torch", part.__name__, "FAILED " + repr(error)[:200])
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
