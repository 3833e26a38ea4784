"""Attention over thousands of keys, which the CPU's team shares out by spans of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from cases import Logits, Piece, Runner, save, settings_of
from devices import Device, on
from tiny_models import tiny_model

TOKENS = 2300  # two whole spans of 1,024 keys and some
WINDOW = 1300  # ends in the middle of a span
CASES = {
    "llama-grouped": {},
    "mistral-window": {"sliding_window": WINDOW},
    "gemma2": {"sliding_window": WINDOW},
}
# Tokens before a decoded one: around the borders of spans and blocks. The longest first, for a
# token that begins a block clears what is behind it.
CONTEXTS = (TOKENS - 1, 2064, 2048, 2047, 1025, 1024, 1023, 1022)


def decoded(native: Runner, context: int) -> Logits:
    """Decode a token of the prompt, alone and between two short sequences; the bits agree."""
    long, *short = native.tables([TOKENS, 20, 90])
    piece: Piece = ([native.ids[context]], context, long)
    others: list[Piece] = [
        ([native.ids[n]], n, table) for n, table in zip((19, 89), short, strict=True)
    ]
    alone = native.logits([piece], "none")[0]
    for granularity in ("budget:2", "budget:0.1"):
        packed = native.logits([others[0], piece, others[1]], granularity)[1]
        assert np.array_equal(packed, alone), (context, granularity)
    return alone


@on(("cpu", "cpu-bf16"))
@pytest.mark.parametrize("case", CASES)
def test_long_sequences_decode_with_the_same_bits_on_any_team(
    device: Device, case: str, tmp_path: Path
) -> None:
    family, shape = settings_of(device, case)
    shape |= CASES[case] | {"max_position_embeddings": 4096}
    saved = save(tiny_model(family, **shape), tmp_path / case, TOKENS)
    found: dict[int, list[Logits]] = {context: [] for context in CONTEXTS}
    for threads in (1, 2, 3):
        native = Runner(dataclasses.replace(device, threads=threads), saved, room=2560)
        long, *short = native.tables([TOKENS, 20, 90])
        native.logits([(native.ids, 0, long)], "none")
        native.logits([(native.ids[:20], 0, short[0]), (native.ids[:90], 0, short[1])], "none")
        for context in CONTEXTS:
            found[context].append(decoded(native, context))
            native.assert_close(found[context][-1], context + 1)
        native.close()
    for context, rows in found.items():
        for row in rows[1:]:
            assert np.array_equal(row, rows[0]), context
