"""What torch's libraries reach on the same GPU: its products in bf16 and in FP8, cuDNN's and
FlashAttention's attention; rows that `bench gpu --shape` puts next to its own.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator
from itertools import cycle
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import linear, scaled_dot_product_attention

from flowprefill.bench.report import Row
from flowprefill.models.model_config import ModelConfig
from flowprefill.scheduling.cost_model import attention_pairs

BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
COPIES = 4  # of the weights, taking turns: a layer finds its own in memory, not in cache
ROUND_US = 2000.0


def us_of(call: Callable[[], object], rounds: int = 7) -> float:
    """Return the median device time of one call, us; a round takes some milliseconds."""
    make_event: Any = torch.cuda.Event
    start, stop = make_event(enable_timing=True), make_event(enable_timing=True)

    def once(calls: int) -> float:
        start.record()
        for _ in range(calls):
            call()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) * 1e3 / calls

    once(1)
    calls = int(min(max(ROUND_US / max(once(2), 1), 1), 200))
    return statistics.median(once(calls) for _ in range(rounds))


def _random(device: torch.device, *shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, device=device, dtype=torch.bfloat16) * scale


def product_rows(
    device: torch.device,
    products: dict[str, tuple[int, int]],
    lengths: Iterable[int],
    weights: str = "bf16",
) -> Iterator[Row]:
    """Measure products: cuBLAS's in bf16, or in e4m3 what `torch._scaled_mm` takes.

    One row with `failure`, the last, where torch or the device has none.

    Args:
        products: (columns, depth) by operator. lengths: rows. weights: bf16 or fp8.
    """
    measure = _fp8_product_us if weights == "fp8" else _product_us
    for rows in lengths:
        for name, (columns, depth) in products.items():
            row: Row = {"table": "torch", "weights": weights, "operator": name}
            row["tokens"] = rows
            try:
                us = measure(device, rows, columns, depth)
            except (AttributeError, RuntimeError) as error:
                yield row | {"failure": _first_line(error)}
                return
            yield row | {"us": us, "tflops_per_s": 2e-6 * rows * columns * depth / us}


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:120]


def _product_us(device: torch.device, rows: int, columns: int, depth: int) -> float:
    x = _random(device, rows, depth)
    weights = cycle([_random(device, columns, depth, scale=0.02) for _ in range(COPIES)])
    return us_of(lambda: linear(x, next(weights)))


def _fp8_product_us(device: torch.device, rows: int, columns: int, depth: int) -> float:
    """Multiply e4m3 by e4m3 into bf16, with a scale for each row and column.

    Without fast accumulation, as ours. Raises RuntimeError or AttributeError where there is none.
    """

    def codes(count: int) -> torch.Tensor:
        return _random(device, count, depth, scale=60.0).to(torch.float8_e4m3fn)

    multiply: Any = torch._scaled_mm
    x, row_scales = codes(rows), torch.full((rows, 1), 0.02, device=device)
    weights = cycle([codes(columns).t() for _ in range(COPIES)])
    scales = torch.full((1, columns), 3e-4, device=device)
    return us_of(lambda: multiply(x, next(weights), row_scales, scales, out_dtype=torch.bfloat16))


def _attention_us(backend: SDPBackend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> float:
    with sdpa_kernel(backend):
        return us_of(
            lambda: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), 5
        )


def attention_rows(
    device: torch.device, config: ModelConfig, lengths: Iterable[int]
) -> Iterator[Row]:
    """Measure causal attention over one prompt; a row with `failure` where a library has none."""
    heads, kv_heads, size = config.num_heads, config.num_kv_heads, config.head_dim
    for tokens in lengths:
        q = _random(device, 1, heads, tokens, size)
        k, v = (_random(device, 1, kv_heads, tokens, size) for _ in range(2))
        for name, backend in BACKENDS.items():
            row: Row = {"table": "torch", "operator": f"attention, {name}", "tokens": tokens}
            try:
                us = _attention_us(backend, q, k, v)
            except RuntimeError as error:
                yield row | {"failure": _first_line(error)}
                continue
            flops = 4 * heads * size * attention_pairs(tokens, 0)
            yield row | {"us": us, "tflops_per_s": flops / us / 1e6}
