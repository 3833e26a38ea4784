"""Weights that stay in GGUF's blocks: the bits of expanded ones, and the invariants of all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from cases import Logits, Piece, Runner, Saved, relative_error
from devices import Device, on
from test_preemption import stop_everywhere
from tiny_files import TinyGguf
from tiny_models import tiny_model

from flowprefill import Engine, EngineConfig, _core
from flowprefill.engine import cpu_device
from flowprefill.errors import ConfigError
from flowprefill.models.checkpoint import open_checkpoint

SHAPE = {
    "vocab_size": 200, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "max_position_embeddings": 1024, "pad_token_id": None,
}  # fmt: skip
# A part of a tensor's name -> its type; what matches last counts, floats where nothing does.
MIXES: dict[str, dict[str, str]] = {
    **{kind: {"blk": kind, "token_embd": kind} for kind in _core.block_formats},
    # As files of middling quality are: types differ inside of one matrix of the model.
    "mixed": {"blk": "Q4_K", "attn_v": "Q6_K", "ffn_down": "Q6_K", "token_embd": "Q6_K"},
    "gate-and-up-differ": {
        "ffn_gate": "Q8_0",
        "ffn_up": "Q5_0",
        "attn_q": "Q4_1",
        "attn_k": "Q8_0",
        "attn_v": "Q5_1",
    },
    "experts": {"ffn": "Q4_K", "exps": "Q4_K", "down_exps": "Q6_K", "ffn_gate_inp": ""},
    "some-are-floats": {"blk": "Q4_0", "attn_k": "", "ffn_up": "F16"},
}
# Mixtures of experts, by family, and what their headers say.
ARCHITECTURES = {"qwen3_moe": "qwen3moe", "mixtral": "llama"}
EXPERT_KEYS = {"expert_count": 4, "expert_used_count": 2}
MIXTURE = {
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 512, "norm_topk_prob": True,
}  # fmt: skip
# (rows, context): as many sequences, and rows in each step, as multiply by unpacked weights.
SAMPLE = [(17, 0), (33, 16), (5, 64), (40, 0), (9, 3), (21, 0)] + [(6, 0)] * 10 + [(7, 0)]
ON_CPU = ("cpu", "cpu-bf16-team")


@pytest.fixture(scope="session")
def write_mix(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Saved]:
    """Write a tiny GGUF file: (a mix, family, settings of its shape); of no known mix: floats."""

    @cache
    def write(mix: str, family: str = "qwen2", **settings: Any) -> Saved:
        folder = tmp_path_factory.mktemp("quantised")
        tiny_model(family, spread=0.05, **(SHAPE | settings)).save_pretrained(folder / "hf")
        tiny = TinyGguf(open_checkpoint(folder / "hf"), ARCHITECTURES.get(family, family))
        if family in ARCHITECTURES:
            tiny.metadata |= EXPERT_KEYS
        for name, values in tiny.tensors.items():
            kinds = [kind for part, kind in MIXES.get(mix, {}).items() if part in name]
            if values.ndim >= 2 and kinds and kinds[-1]:
                tiny.quantised[name] = gguf.GGMLQuantizationType[kinds[-1]]
        path = tiny.write(folder / "tiny.gguf")
        ids = np.random.default_rng(5).integers(0, SHAPE["vocab_size"], 200).tolist()
        return Saved(path, ids, np.zeros(0, np.float32))

    return write


@pytest.fixture
def open_both(device: Device) -> Iterator[Callable[[Saved], tuple[Runner, Runner]]]:
    """Load a file with its blocks kept, and expanded."""
    opened: list[Runner] = []

    def open_one(saved: Saved) -> tuple[Runner, Runner]:
        opened.extend(Runner(device, saved, keeps_blocks=keeps) for keeps in (True, False))
        return opened[-2], opened[-1]

    yield open_one
    for one in opened:
        one.close()


def packed(native: Runner, granularity: str) -> Logits:
    """Logits of several prompts in one run: no product of it has few rows."""
    sizes = [rows + context for rows, context in SAMPLE]
    tables = native.tables(sizes)
    pieces: list[Piece] = [
        (native.ids[context : context + rows], context, table)
        for (rows, context), table in zip(SAMPLE, tables, strict=True)
    ]
    native.model.zero_blocks(list(range(native.blocks)))
    return native.logits(pieces, granularity)


@pytest.mark.parametrize("mix", MIXES)
@on(ON_CPU)
def test_kept_weights_give_what_expanded_ones_give(
    device: Device,
    mix: str,
    write_mix: Callable[..., Saved],
    open_both: Callable[..., tuple[Runner, Runner]],
) -> None:
    """Many rows the same bits; a single one, which multiplies the blocks as they are, nearly."""
    kept, expanded = open_both(write_mix(mix))
    assert kept.model.weight_bytes < expanded.model.weight_bytes
    for granularity in ("none", "budget:0.1"):
        assert np.array_equal(packed(kept, granularity), packed(expanded, granularity))
    got = []
    for native in (kept, expanded):
        (table,) = native.tables([70])
        native.logits([(native.ids[:60], 0, table)], "none")
        got.append(native.logits([([native.ids[60]], 60, table)], "none")[0])
    assert relative_error(got[0], got[1]) < device.tolerance
    if device.dtype == "bf16":
        assert not np.array_equal(got[0], got[1]), "the blocks were rounded to bf16 first"


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("settings", [
    {"tie_word_embeddings": True},
    {"head_dim": 20},  # keys and values meet in a strip of 16 columns, which has one type
])  # fmt: skip
@on(ON_CPU)
def test_turned_rows_tied_heads_and_odd_strips_too(
    family: str,
    settings: dict[str, Any],
    write_mix: Callable[..., Saved],
    open_both: Callable[..., tuple[Runner, Runner]],
) -> None:
    mix = "mixed" if "tie_word_embeddings" in settings else "gate-and-up-differ"
    kept, expanded = open_both(write_mix(mix, family, **settings))
    assert np.array_equal(packed(kept, "operator"), packed(expanded, "operator"))


@on(ON_CPU)
def test_a_kept_model_preempted_all_along_is_bit_equal(
    device: Device, write_mix: Callable[..., Saved]
) -> None:
    native = Runner(device, write_mix("mixed"), keeps_blocks=True)
    for granularity in ("operator", "chunk:32", "budget:0.1"):
        stop_everywhere(native, granularity, most=250)
    native.close()


@pytest.mark.parametrize("family", ARCHITECTURES)
@on(ON_CPU)
def test_experts_that_stay_in_blocks(
    device: Device,
    family: str,
    write_mix: Callable[..., Saved],
    open_both: Callable[..., tuple[Runner, Runner]],
) -> None:
    """Nearly what expanded ones give: an expert may have few rows. The same bits when stopped."""
    kept, expanded = open_both(write_mix("experts", family, **MIXTURE))
    assert kept.model.weight_bytes < expanded.model.weight_bytes / 2
    for granularity in ("none", "budget:0.1"):
        wanted = packed(expanded, granularity)
        assert relative_error(packed(kept, granularity), wanted) < device.tolerance
    stop_everywhere(kept, "budget:0.1", most=250)


def test_weights_take_the_bytes_of_the_file(write_mix: Callable[..., Saved]) -> None:
    """A tied table and head share theirs."""
    saved = write_mix("Q4_K", tie_word_embeddings=True)
    checkpoint = open_checkpoint(saved.folder)
    formats = checkpoint.block_formats(_core.block_formats)
    model = _core.Model(checkpoint.graph, "f32", 1, formats=formats)
    padding = 8 * SHAPE["hidden_size"] * 144 // 256  # 200 tokens are 12.5 strips of 16
    assert model.weight_bytes == checkpoint.total_bytes + padding


@pytest.mark.parametrize(
    ("quantization", "most_gib", "kept"),
    [("gguf", 1.0, True), ("none", 0.0, False), ("auto", 1.0, False), ("auto", 0.0, True)],
)
def test_settings_and_size_say_whether_an_engine_keeps_blocks(
    write_mix: Callable[..., Saved],
    monkeypatch: pytest.MonkeyPatch,
    quantization: str,
    most_gib: float,
    kept: bool,
) -> None:
    monkeypatch.setattr(cpu_device, "MOST_EXPANDED_GIB", most_gib)
    saved = write_mix("Q8_0")
    settings = EngineConfig(
        device="cpu", dtype="f32", threads=1, kv_cache_gib=0.02, calibrate=False,
        quantization=quantization,
    )  # fmt: skip
    with Engine(saved.folder, settings) as engine:
        assert engine.describe()["quantization"] == ("gguf" if kept else "none")
        worker: Any = engine._worker
        elements = sum(count for _, count in open_checkpoint(saved.folder).graph.products())
        stored: float = engine.model_shape.weight_bytes + engine.model_shape.head_bytes
        assert (stored < 2 * elements) is kept
        assert (worker._model.weight_bytes < 3 * elements) is kept


def test_a_file_without_quantised_weights_has_none_to_keep(
    write_mix: Callable[..., Saved],
) -> None:
    saved = write_mix("floats")
    with pytest.raises(ConfigError, match=r"quantization: got 'gguf', but tiny has no") as caught:
        Engine(saved.folder, EngineConfig(device="cpu", quantization="gguf"))
    assert caught.value.param == "quantization"


def test_what_does_not_fit_is_named(write_mix: Callable[..., Saved]) -> None:
    checkpoint = open_checkpoint(write_mix("Q4_K").folder)
    name = "layers.0.q"
    with pytest.raises(ValueError, match="quantised type: got IQ1_M, expected one of Q4_0"):
        _core.Model(checkpoint.graph, "f32", 1, formats={name: "IQ1_M"})
    model = _core.Model(checkpoint.graph, "f32", 1, formats={name: "Q4_K"})
    with pytest.raises(ValueError, match=rf"{name}: got rows of 143 bytes, expected a multiple"):
        model.load_blocks(name, np.zeros((256, 143), np.uint8))
    with pytest.raises(ValueError, match=rf"{name}: got shape \[255, 256\], expected \[256, 256\]"):
        model.load_blocks(name, np.zeros((255, 144), np.uint8))
    with pytest.raises(
        RuntimeError, match=r"layers\.0\.k: came in blocks, which was not announced"
    ):
        model.load_blocks("layers.0.k", np.zeros((128, 144), np.uint8))


def test_pages_of_the_file_do_not_stay_in_memory(write_mix: Callable[..., Saved]) -> None:
    """Each tensor's are dropped once it was consumed."""
    saved = write_mix("Q8_0", vocab_size=8_000)
    checkpoint = open_checkpoint(saved.folder)
    for _, tensor in checkpoint.weights():
        float(tensor.sum())
    resident: list[int] = []
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    for line in lines:
        if line.endswith(str(saved.folder)):
            rss = next(row for row in lines if row.startswith("Rss:"))
            resident.append(int(rss.split()[1]) * 1024)
    assert resident, "the file is not mapped"
    assert sum(resident) < checkpoint.total_bytes / 4
