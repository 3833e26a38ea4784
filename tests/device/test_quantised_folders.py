"""Quantised checkpoints: the logits of their weights dequantised, on every device."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from cases import Runner, save, settings_of
from devices import ONE, Device, on
from quantised_folders import KINDS, quantise_folder
from tiny_models import tiny_model

SOME = ("fp8 block", "fp8 tensor", "float channel", "int8 channel", "int4 group, zero points")


@pytest.mark.parametrize("kind", SOME)
@on(ONE)
def test_logits_are_those_of_the_dequantised_checkpoint(
    device: Device, kind: str, tmp_path: Path
) -> None:
    family, shape = settings_of(device, "qwen3")
    model = tiny_model(family, spread=0.15, rounds=device.is_cuda, **shape)
    model.save_pretrained(tmp_path / "plain")
    quantised = tmp_path / "quantised"
    meant = quantise_folder(tmp_path / "plain", quantised, KINDS[kind])
    state = {name: torch.from_numpy(values) for name, values in meant.items()}
    assert not model.load_state_dict(state, strict=False).unexpected_keys
    saved = save(model, tmp_path / "dequantised")
    logits = []
    for folder in (saved.folder, quantised):
        runner = Runner(device, type(saved)(folder, saved.ids, saved.expected))
        try:
            logits.append(runner.prefill(saved.ids[:130], "operator", 130))
            runner.assert_close(logits[-1], 130)
        finally:
            runner.close()
    np.testing.assert_array_equal(*logits)
