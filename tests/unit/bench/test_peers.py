"""`bench prefill --peers`: a real peer in its process, bad flags, the files of peers, the rows."""

from __future__ import annotations

import math
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, cast

import pytest
import torch
from tiny_models import save_with_tokenizer, tiny_model

from flowprefill.bench import peers
from flowprefill.bench.peer_models import write_gguf
from flowprefill.bench.peers import DECODE_BATCHES, _Child, _measure, _pythons, rows_of
from flowprefill.errors import ConfigError
from flowprefill.models.checkpoint import open_checkpoint

TINY = {
    "vocab_size": 49_152, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": None,
}  # fmt: skip


def test_peer_generates_in_its_process_and_says_what_it_cannot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import transformers

    save_with_tokenizer(tiny_model("llama", **TINY), tmp_path / "tiny")
    pythons = {"transformers": sys.executable}
    child = _Child.start("transformers", pythons, str(tmp_path / "tiny"), 1)
    try:
        assert child.version == transformers.__version__
        assert _is_stopped(child)
        assert child.generate_s([[5, 6, 7], [8, 9, 10]], 3) > 0.0
        assert _is_stopped(child)  # it takes no time of what is measured next
        assert math.isnan(child.generate_s([[5], [6, 7]], 1))
        assert "transformers: ValueError" in capsys.readouterr().err
        assert child.generate_s([[5]], 1) > 0.0
    finally:
        child.close()


def _is_stopped(child: _Child) -> bool:
    status = os.waitpid(child._process.pid, os.WUNTRACED)[1]  # waits until it is
    return os.WIFSTOPPED(status)


def test_peer_that_does_not_start_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="transformers ended with 1"):
        _Child.start("transformers", {"transformers": sys.executable}, str(tmp_path), 1)


@pytest.mark.parametrize("text", ["transformers", "vllm=/no/such/file", f"mlx={sys.executable}"])
def test_interpreter_of_a_peer_is_checked(text: str) -> None:
    with pytest.raises(ConfigError, match="peer-python: got") as error:
        _pythons([text])
    assert repr(text) in error.value.message


MIXTURE = {
    "hidden_size": 64, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3_moe"])
def test_gguf_file_for_llama_cpp_holds_the_checkpoint(family: str, tmp_path: Path) -> None:
    exact = TINY | {"rms_norm_eps": 2.0**-20}  # the file has it in 32 bits
    exact |= MIXTURE if family == "qwen3_moe" else {}
    tiny_model(family, **exact).save_pretrained(tmp_path)
    write_gguf(tmp_path, "F32")
    saved, written = open_checkpoint(tmp_path), open_checkpoint(tmp_path / "F32.gguf")
    known = {"bos_token_id": None, "eos_token_ids": ()}  # these belong to its tokenizer
    assert replace(written.config, **known) == replace(saved.config, **known)
    for (name, values), (_, expected) in zip(written.weights(), saved.weights(), strict=True):
        torch.testing.assert_close(values, expected, rtol=0, atol=0, msg=name)


def test_only_files_that_are_missing_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[list[str]] = []
    monkeypatch.setattr(peers, "default_cache_dir", lambda: tmp_path)
    monkeypatch.setattr(peers.subprocess, "run", lambda command, check: made.append(command[3:]))
    folder = peers._checkpoint("random-0.5b", ["vllm", "llama-cpp", "llama-cpp-int8"])
    folder.mkdir(parents=True)
    (folder / "BF16.gguf").touch()
    peers._checkpoint("random-0.5b", ["llama-cpp", "llama-cpp-int8"])
    peers._checkpoint("random-0.5b", ["llama-cpp", "transformers"])
    first, second = made
    assert first == ["random-0.5b", str(folder), "BF16", "Q8_0"]
    assert second == ["random-0.5b", str(folder), "Q8_0"]


def test_no_prompt_is_measured_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    class Peer:  # it would keep the prefixes that it has seen
        name = "peer"
        seen: ClassVar[list[tuple[int, ...]]] = []

        def generate_s(self, prompts: list[list[int]], tokens: int) -> float:
            self.seen += [tuple(ids) for ids in prompts]
            return float(tokens)

    class Engine:
        vocab_size = 49_152

    monkeypatch.setattr(peers, "_ours_s", lambda engine, prompts, tokens: float(tokens))
    samples = []
    for known in _measure(cast(Any, Engine()), cast(Any, [Peer()]), "m", [100], 2, 0):
        samples.append(sum(map(len, known.values())))  # so a run that is ended leaves what it did
        rows = rows_of("m", known)
    assert samples == [2, 4, 8, 10, 12, 16]
    of_decode = (1 + 2 * 2) * sum(DECODE_BATCHES) + 2 * 16
    assert len(Peer.seen) == len(set(Peer.seen)) == 2 * 1 + of_decode
    decoded = {row["work"]: row["tokens_per_s"] for row in rows if row["engine"] == "peer"}
    assert decoded == {
        "prefill 100": 100.0,
        "decode of 1": 1.0,
        "decode of 16": 16.0,
        "steps of 16": 16.0,
    }


def test_rows_are_medians_with_the_factor_to_ours() -> None:
    ours, other = rows_of(
        "m", {("decode of 1", "flowprefill"): [90.0, 100.0, 120.0], ("decode of 1", "vllm"): [40.0]}
    )
    assert (ours["tokens_per_s"], ours["min"], ours["max"]) == (100.0, 90.0, 120.0)
    assert other["flowprefill_faster"] == 2.5
    assert "flowprefill_faster" not in ours


def test_rows_leave_out_what_could_not_be_measured() -> None:
    (ours, other) = rows_of(
        "m", {("w", "flowprefill"): [math.nan, 100.0], ("w", "llama-cpp"): [math.nan, math.nan]}
    )
    assert (ours["tokens_per_s"], ours["samples"]) == (100.0, 1)
    assert math.isnan(other["tokens_per_s"])
