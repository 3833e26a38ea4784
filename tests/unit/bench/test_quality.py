"""`bench quality`: log-probabilities as transformers has them, and the bar for int8."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import SERVED, save_with_tokenizer, tiny_model

from flowprefill import _core
from flowprefill.bench.quality import NUMBERS, TEXT, Score, passages_of, rows_of, score
from flowprefill.cli import main
from flowprefill.errors import ConfigError
from flowprefill.models.checkpoint import open_checkpoint

needs_int8 = pytest.mark.skipif(
    not (_core.has_int8_gemm() and _core.has_bf16_gemm()),
    reason="this processor does not multiply bytes and bf16 natively",
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    model: Any = tiny_model("llama", spread=0.2, **SERVED | {"max_position_embeddings": 512})
    folder = tmp_path_factory.mktemp("quality") / "tiny"
    save_with_tokenizer(model, folder)
    return folder, model


def test_log_probabilities_are_those_of_transformers(tiny: tuple[Path, Any]) -> None:
    folder, model = tiny
    checkpoint = open_checkpoint(folder)
    passages = passages_of(checkpoint, TEXT, 20, 3)
    assert passages.shape == (3, 20)
    with torch.no_grad():
        logits = model(torch.from_numpy(passages).long()).logits.double()
    wanted = torch.log_softmax(logits[:, :-1], -1)
    next_ids = torch.from_numpy(passages[:, 1:]).long()
    wanted_log_probs = wanted.gather(2, next_ids[..., None])[..., 0].T.flatten()
    found = score(checkpoint, passages, "f32", threads=1)
    np.testing.assert_allclose(found.log_probs, wanted_log_probs.numpy(), atol=1e-3)
    assert (found.choices == wanted.argmax(-1).T.flatten().numpy()).mean() > 0.95
    assert found.perplexity == pytest.approx(math.exp(-float(wanted_log_probs.mean())), rel=1e-3)


def test_rows_compare_with_the_first() -> None:
    first = Score(np.array([-1.0, -2.0, -3.0]), np.array([1, 2, 3]), 4 << 20)
    other = Score(np.array([-1.5, -2.0, -2.8]), np.array([1, 2, 4]), 1 << 20)
    same, row = rows_of({"f32": first, "f32+int8": other})
    assert (same["perplexity"], same["change"], same["agreement"]) == (math.exp(2), 0.0, 1.0)
    assert row["perplexity"] == pytest.approx(math.exp(2.1))
    assert row["change"] == pytest.approx(math.exp(0.1) - 1)
    assert (row["agreement"], row["weights"]) == (2 / 3, 1.0)


@needs_int8
def test_int8_keeps_the_perplexity_of_the_default_model() -> None:
    checkpoint = open_checkpoint("smollm2-135m")
    passages = passages_of(checkpoint, TEXT, 96, 16)
    plain, quantised = (score(checkpoint, passages, name) for name in ("bf16", "bf16+int8"))
    assert quantised.perplexity / plain.perplexity < 1.015
    assert (quantised.choices == plain.choices).mean() > 0.9
    assert quantised.weight_bytes < 0.62 * plain.weight_bytes  # the embedding stays


@needs_int8
def test_command_writes_a_row_for_each_kind_of_numbers(
    tiny: tuple[Path, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", str(tiny[0]), "--tokens", "8", "--passages", "2", "--threads", "1"]
    assert main(["bench", "quality", *arguments]) == 0
    table = capsys.readouterr().out
    assert all(name in table for name in NUMBERS)


def test_text_that_is_too_short_is_refused(tiny: tuple[Path, Any], tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("Two words")
    with pytest.raises(ConfigError, match="expected at least 64"):
        passages_of(open_checkpoint(tiny[0]), text, 64, 1)
