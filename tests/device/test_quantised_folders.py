"""Quantised checkpoints: the logits of their weights dequantised, on every device."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from cases import Runner, save, settings_of
from devices import ONE, Device, on
from quantised_folders import KINDS, Tensors, change_tensors, quantise_folder
from tiny_models import tiny_model

SOME = ("fp8 block", "fp8 tensor", "float channel", "int8 channel", "int4 group, zero points")
CASES = ("qwen3", "qwen3-moe", "mixtral-window")


@pytest.mark.parametrize("kind", SOME)
@on(ONE, CASES)
def test_logits_are_those_of_the_dequantised_checkpoint(
    device: Device, case: str, kind: str, tmp_path: Path
) -> None:
    family, shape = settings_of(device, case)
    plain, quantised = tmp_path / "plain", tmp_path / "quantised"
    tiny_model(family, spread=0.15, rounds=device.is_cuda, **shape).save_pretrained(plain)
    meant = quantise_folder(plain, quantised, KINDS[kind])

    def put_meant(tensors: Tensors) -> None:
        assert meant.keys() <= tensors.keys()
        tensors.update({name: torch.from_numpy(values) for name, values in meant.items()})

    change_tensors(plain, put_meant)
    model = transformers.AutoModelForCausalLM.from_pretrained(plain, attn_implementation="eager")
    saved = save(model.eval(), tmp_path / "dequantised")
    logits = []
    for folder in (saved.folder, quantised):
        runner = Runner(device, type(saved)(folder, saved.ids, saved.expected))
        try:
            logits.append(runner.prefill(saved.ids[:130], "operator", 130))
            runner.assert_close(logits[-1], 130)
        finally:
            runner.close()
    np.testing.assert_array_equal(*logits)
