"""Profiles of a machine that can be measured: from an engine's calibration, fitted to solo prompts.

Called by `flowprefill simulate --profile cpu` and `--against-engine`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from flowprefill.config import Granularity
from flowprefill.models.families import build_graph
from flowprefill.native import _core
from flowprefill.scheduling.cost_model import attention_pairs
from flowprefill.simulation.costs import WorkCosts
from flowprefill.simulation.profile import Profile

if TYPE_CHECKING:
    from flowprefill.engine import Engine

LEAST_FACTOR = 0.1  # of a part's time: what a fit may make of it at least


def profile_of(engine: Engine) -> Profile:
    """Return the profile of an engine's model on this machine's CPU, by its calibration."""
    graph = build_graph(engine.model_config)
    quantization = engine.config.quantization
    numbers = (
        engine.dtype if quantization in ("auto", "none") else f"{engine.dtype}, {quantization}"
    )
    return Profile(
        name=f"{engine.model_id}@cpu",
        source=f"calibration on this machine, {engine.threads} threads, {numbers}",
        graph=graph,
        shape=engine.model_shape,
        rates=engine.rates,
        cuts=_core.cpu_cuts(
            engine.dtype, engine.threads, "int8" if quantization == "int8" else "none"
        ),
    )


def fitted(
    profile: Profile, granularity: Granularity, measured: Sequence[tuple[int, float]]
) -> Profile:
    """Return the profile with its rates scaled to times of prompts that had the machine alone.

    Products, attention and the run's overhead each get one factor, by least squares of the
    relative error; no part is made less than a tenth of what the profile says.

    Args:
        measured: (tokens, seconds to first token) of at least three lengths.
    """
    if len({tokens for tokens, _ in measured}) < 3:
        raise ValueError(f"got {len(measured)} measurements, expected three lengths or more")
    costs = WorkCosts(profile, granularity)
    overhead_s = profile.rates.run_overhead_s
    parts, weights = [], []
    for tokens, seconds in measured:
        products_s = costs.prefill_s(tokens, 0.0) - overhead_s
        attention_s = costs.prefill_s(tokens, attention_pairs(tokens, 0)) - overhead_s - products_s
        parts.append((overhead_s, products_s, attention_s))
        weights.append(1.0 / seconds)
    matrix = np.array(parts) * np.array(weights)[:, None]
    factors = _bounded_least_squares(matrix, np.ones(len(parts)))
    rates = profile.rates
    return replace(
        profile.with_rates(
            run_overhead_s=overhead_s * factors[0],
            gemm_flops_per_s=rates.gemm_flops_per_s / factors[1],
            weight_bytes_per_s=rates.weight_bytes_per_s / factors[1],
            attention_flops_per_s=rates.attention_flops_per_s / factors[2],
        ),
        source=f"{profile.source}; fitted to {len(measured)} prompts alone",
    )


def _bounded_least_squares(matrix: np.ndarray, wanted: np.ndarray) -> list[float]:
    """Solve for factors >= LEAST_FACTOR: one column after the other, until nothing changes."""
    factors = np.ones(matrix.shape[1])
    squares = (matrix**2).sum(axis=0)
    for _ in range(10_000):
        before = factors.copy()
        for column in range(len(factors)):
            left = wanted - matrix @ factors + matrix[:, column] * factors[column]
            best = float(matrix[:, column] @ left / squares[column])
            factors[column] = max(best, LEAST_FACTOR)
        if np.abs(factors - before).max() < 1e-9:
            break
    return [float(factor) for factor in factors]
