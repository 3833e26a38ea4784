"""Fixtures of the native tests: saved tiny models with transformers' logits, runners over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import numpy as np
import pytest
from native_models import CASES, Runner, Saved, reference_logits, tiny_model

from flowprefill import _core

LONGEST = 200


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Saved]:
    """Make, save and evaluate a case of CASES once."""

    @cache
    def save(case: str) -> Saved:
        model = tiny_model(case)
        folder = tmp_path_factory.mktemp("tiny") / case
        model.save_pretrained(folder)
        vocab = model.config.vocab_size
        ids = np.random.default_rng(5).integers(0, vocab, LONGEST).tolist()
        return Saved(folder, ids, reference_logits(model, ids))

    assert CASES
    return save


@pytest.fixture(scope="session")
def runner(saved: Callable[[str], Saved]) -> Iterator[Callable[..., Runner]]:
    """Load a case: (case, dtype, threads, block_tokens) -> Runner; each once."""
    opened: list[Runner] = []

    @cache
    def open_runner(
        case: str, dtype: str = "f32", threads: int = 1, block_tokens: int = 16
    ) -> Runner:
        if dtype == "bf16" and not _core.has_bf16_gemm():
            pytest.skip("this processor does not multiply bf16 natively")
        blocks = 1536 // block_tokens
        opened.append(Runner(saved(case).folder, dtype, threads, block_tokens, blocks))
        return opened[-1]

    yield open_runner
    for one in opened:
        one.close()
