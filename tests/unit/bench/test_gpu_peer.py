"""What `bench gpu --peer` makes of a peer that fails, ends or does not answer; what it asks for."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from flowprefill.bench import gpu_peer
from flowprefill.bench.gpu_peer import Ours, PeerError, Setting, Work, works_of

HERE = Setting("tiny", 1, "cpu", 1e6)


def rows_of(setting: Setting) -> Iterator[dict[str, Any]]:
    class Model:
        def prefill_s(self, tokens: int, plan: None) -> float:
            return 1.0

    return gpu_peer.rows(setting, Ours(cast(Any, Model()), None), [520, 600], [])


def test_what_compiles_is_asked_for_last() -> None:
    works = works_of(["sdpa", "other"], [128, 512, 8192], [(1, 1023), (16, 1023)])
    assert [(work.how, work.kind, work.tokens, work.sequences) for work in works] == [
        *(("sdpa", "prefill", n, 1) for n in (512, 8192)),
        *(("sdpa", "decode", 1023, n) for n in (1, 16)),
        *(("other", "prefill", n, 1) for n in (512, 8192)),
        *(("other", "decode", 1023, n) for n in (1, 16)),
        ("sdpa, torch.compile", "decode", 1023, 1),
        ("sdpa, torch.compile", "prefill", 8192, 1),
    ]


def test_a_rate_is_of_the_tokens_that_are_new() -> None:
    assert Work("sdpa", "prefill", 512).rate(2.0) == 256
    assert Work("sdpa", "decode", 1023, 16).rate(2.0) == 8


def test_a_peer_that_does_not_start_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_peer, "CHILD", "no_such_module")
    assert list(rows_of(HERE)) == [{"failure": "its process ended with 1"}]


def test_a_peer_that_does_not_answer_is_ended_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "silent.py").write_text("input()")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(gpu_peer, "CHILD", "silent")
    since_s = time.monotonic()
    (row,) = rows_of(Setting("tiny", 1, "cpu", 0.2))
    assert row == {"failure": "no answer within the 0.2 s for all"}
    assert time.monotonic() - since_s < 60


def test_what_there_is_no_time_for_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ended:
        name, attentions = "a peer", ("sdpa",)

        def __init__(self, setting: Setting) -> None:
            self.left = 1

        def has(self, seconds: float) -> bool:
            return self.left > 0

        def seconds(self, work: Work) -> float:
            self.left -= 1
            raise PeerError("its process ended with -9")

        def close(self) -> None:
            pass

    monkeypatch.setattr(gpu_peer, "Peer", Ended)
    first, second = rows_of(HERE)
    assert (first["tokens"], first["failure"]) == (520, "its process ended with -9")
    assert (second["tokens"], second["failure"][:8]) == (600, "left out")
    assert "tokens_per_s" not in first
