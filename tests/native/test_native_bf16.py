"""bf16 against float32: the error that rounding explains, and no more."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from native_models import CASES, Logits, Piece, Runner, Saved, plan

# Rounding to 8 bits of mantissa at each product's input: 2^-9 relative each, some tens of them.
RELATIVE_RMS = 3e-2


def relative_rms(got: Logits, wanted: Logits) -> float:
    return float(np.sqrt(np.mean((got - wanted) ** 2) / np.mean(wanted**2)))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_bf16_logits_are_near_float32(
    case: str, threads: int, runner: Callable[..., Runner], saved: Callable[[str], Saved]
) -> None:
    native, model = runner(case, "bf16", threads), saved(case)
    for tokens in (1, 2, 15, 16, 17, 64, 65, 128, 129, 200):
        for granularity in ("none", "budget:2"):
            got = native.prefill(model.ids[:tokens], plan(granularity), tokens)
            assert relative_rms(got, model.expected[tokens - 1]) < RELATIVE_RMS, tokens


@pytest.mark.parametrize("block_tokens", [16, 32, 64])
@pytest.mark.parametrize("case", CASES)
def test_bf16_packed_continued_and_decoded(
    case: str, block_tokens: int, runner: Callable[..., Runner], saved: Callable[[str], Saved]
) -> None:
    native, model = runner(case, "bf16", 1, block_tokens), saved(case)
    lengths, splits = (200, 17, 90), (64, 9, 89)
    tables = native.tables(lengths)
    native.logits(
        [(model.ids[:n], 0, t) for n, t in zip(splits, tables, strict=True)], plan("operator")
    )
    pieces: list[Piece] = [
        (model.ids[s:n], s, t) for n, s, t in zip(lengths, splits, tables, strict=True)
    ]
    got = native.logits(pieces, plan("chunk:32"))
    for row, tokens in enumerate(lengths):
        assert relative_rms(got[row], model.expected[tokens - 1]) < RELATIVE_RMS
