"""Tiny random checkpoints of every family, and runs of native models on them."""

from __future__ import annotations

import itertools
import select
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from devices import Device

from flowprefill import _core
from flowprefill.config import Granularity
from flowprefill.engine.loading import fill_model, plan_options
from flowprefill.models.checkpoint import open_checkpoint
from flowprefill.scheduling.cost_model import MachineRates

Logits = npt.NDArray[np.float32]
Piece = tuple[list[int], int, npt.NDArray[np.int32]]  # new tokens, context, block table

LONGEST = 200  # tokens of the prompt whose logits are known
ROOM = 1536  # tokens of a runner's cache, unless it asks for more
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
GEMMA2 = {  # caps so low that they matter
    "query_pre_attn_scalar": 20,
    "sliding_window": 40,
    "attn_logit_softcapping": 1.5,
    "final_logit_softcapping": 4.0,
}
GEMMA3 = {
    "query_pre_attn_scalar": 20,
    "sliding_window": 40,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
    },
}
LONGROPE = {
    "original_max_position_embeddings": 64,
    "rope_scaling": {
        "rope_type": "longrope",
        "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
        "long_factor": [1.0, 1.5, 2.0, 4.0, 8.0, 16.0],
    },
}
GRANITE = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.22,
    "logits_scaling": 4.0,
}
FAMILIES_OF_EXPERTS = ("qwen3_moe", "mixtral", "olmoe")
# Layers of both kinds; few experts, so that every row leaves some out. Hidden sizes and those of
# experts are whole blocks of a product.
QWEN3_MOE = {
    "hidden_size": 64,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
    "mlp_only_layers": [1],
}
MIXTRAL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
OLMOE = {
    "hidden_size": 64,
    "head_dim": 16,
    "intermediate_size": 64,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "norm_topk_prob": False,
}
# name -> (family, what differs from the device's shape)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-grouped": ("llama", {}),
    "llama-multi-head": ("llama", {"num_key_value_heads": 4, "head_dim": 16, "hidden_size": 64}),
    "llama-one-kv-head-tied": ("llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-wide-head": ("llama", {"head_dim": 40, "vocab_size": 97, "intermediate_size": 34}),
    "llama-heads-of-128": ("llama", {"head_dim": 128, "num_key_value_heads": 1}),
    "llama-rope-linear": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "llama-rope-llama3": ("llama", {"rope_scaling": LLAMA3}),
    "llama-rope-yarn": ("llama", {"rope_scaling": YARN}),
    "mistral-window": ("mistral", {"sliding_window": 40}),
    "mistral-no-window": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-some-windows": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 33, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {}),
    "qwen3-biases-tied": ("qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
    "gemma2": ("gemma2", GEMMA2),
    "gemma2-uncapped-biases": (
        "gemma2",
        {
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "attention_bias": True,
            "sliding_window": 40,
            "tie_word_embeddings": False,
        },
    ),
    "gemma3": ("gemma3_text", GEMMA3),
    "gemma3-global-scaled": (
        "gemma3_text",
        GEMMA3 | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "head_dim": 16},
    ),
    "phi3": ("phi3", {}),
    "phi3-window-partial": ("phi3", {"sliding_window": 40, "partial_rotary_factor": 0.5}),
    "phi3-longrope": ("phi3", LONGROPE),
    "glm": ("glm", {"head_dim": 16}),
    "glm4": ("glm4", {"head_dim": 16}),
    "glm4-no-biases-quarter": (
        "glm4",
        {"attention_bias": False, "partial_rotary_factor": 0.25, "head_dim": 24},
    ),
    "olmo2": ("olmo2", {}),
    "olmo2-biases-one-kv-head": ("olmo2", {"attention_bias": True, "num_key_value_heads": 1}),
    "granite": ("granite", GRANITE),
    "granite-biases": ("granite", GRANITE | {"attention_bias": True, "mlp_bias": True}),
    "qwen3-moe": ("qwen3_moe", QWEN3_MOE),
    "qwen3-moe-plain-weights": (
        "qwen3_moe",
        QWEN3_MOE | {"norm_topk_prob": False, "mlp_only_layers": [], "attention_bias": True},
    ),
    "mixtral-window": ("mixtral", MIXTRAL | {"sliding_window": 40}),
    "olmoe": ("olmoe", OLMOE),
    "olmoe-summing-to-one": ("olmoe", OLMOE | {"norm_topk_prob": True, "num_experts_per_tok": 8}),
}
# One case of each family whose layers are not those of a Llama.
NEWER = (
    "gemma2",
    "gemma3",
    "phi3-window-partial",
    "glm4",
    "olmo2-biases-one-kv-head",
    "granite-biases",
    "qwen3-moe",
    "mixtral-window",
    "olmoe",
)
MIXTURES = tuple(name for name, (family, _) in CASES.items() if family in FAMILIES_OF_EXPERTS)
EXACT = 1e-3  # tolerance of a device that rounds no numbers
# Those that CUDA computes, with what makes their sizes such that its kernels take them.
ON_CUDA: dict[str, dict[str, Any]] = {
    "llama-grouped": {},
    "llama-heads-of-128": {},
    "llama-biases": {},
    "qwen2": {},
    "qwen3": {},
    "mistral-window": {},
    "gemma2": {"head_dim": 256, "query_pre_attn_scalar": 100},
    "gemma3": {
        "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 100,
    },
    "phi3-window-partial": {"head_dim": 96, "partial_rotary_factor": 0.75},
    "glm": {"head_dim": 64},
    "glm4": {"head_dim": 64},
    "glm4-no-biases-quarter": {"head_dim": 128},
    "olmo2": {},
    "olmo2-biases-one-kv-head": {},
    "granite-biases": {"attention_multiplier": 0.1},
}
# Rates at which this machine would be so slow that every budget cuts everything up.
SLOW = MachineRates(2e6, 1e6, 1e6, 1e-4)


def takes(device: Device, case: str) -> bool:
    """Whether a device computes this case, and nearly what transformers does.

    Where numbers are rounded, a row of a mixture may have another expert: see test_experts.py.
    """
    if case in MIXTURES and device.tolerance > EXACT:
        return False
    return not device.is_cuda or case in ON_CUDA


def settings_of(device: Device, case: str) -> tuple[str, dict[str, Any]]:
    """Return the family of a case, and its configuration at the device's sizes."""
    family, settings = CASES[case]
    return family, {**device.shape, **settings, **(ON_CUDA[case] if device.is_cuda else {})}


def reference_logits(model: transformers.PreTrainedModel, ids: Sequence[int]) -> Logits:
    """Logits of every position by transformers, [tokens, vocab]."""
    with torch.no_grad():
        logits: Logits = model(torch.tensor([list(ids)])).logits[0].float().numpy()
    return logits


def relative_error(got: Logits, wanted: Logits) -> float:
    """Largest difference over the largest logit."""
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


@dataclass(frozen=True)
class Saved:
    """A checkpoint on disk, a prompt, and transformers' logits at every position of it."""

    folder: Path
    ids: list[int]
    expected: Logits


def save(model: transformers.PreTrainedModel, folder: Path, tokens: int = LONGEST) -> Saved:
    """Save a model, and evaluate it on a random prompt."""
    model.save_pretrained(folder)
    ids = np.random.default_rng(5).integers(0, model.config.vocab_size, tokens).tolist()
    return Saved(folder, ids, reference_logits(model, ids))


class Runner:
    """A native model with its cache and an executor of its own.

    Args:
        keeps_blocks: whether quantised weights stay so; on CUDA all products of layers are FP8
            then.
        room: tokens of its cache.
        options: of a CUDA model.
    """

    def __init__(
        self,
        device: Device,
        saved: Saved,
        block_tokens: int = 16,
        max_context: int = 0,
        keeps_blocks: bool = False,
        room: int = ROOM,
        **options: Any,
    ) -> None:
        self.device = device
        self.saved = saved
        self.native: Any = device.module
        checkpoint = open_checkpoint(saved.folder, max_context)
        types = ("E4M3",) if device.is_cuda else _core.block_formats
        formats = checkpoint.block_formats(types) if keeps_blocks else {}
        if device.is_cuda:
            options |= {"quantizes_fp8": True, "fp8_sources": list(formats)} if keeps_blocks else {}
            sizes = {"max_tokens": 640, "max_sequences": 16, "max_context": 320}
            self.model: Any = self.native.Model(checkpoint.graph, sizes | options)
        else:
            self.model = self.native.Model(
                checkpoint.graph, device.dtype, device.threads, device.quantization, formats=formats
            )
        fill_model(self.model, checkpoint, in_blocks=formats)
        self.block_tokens = block_tokens
        self.blocks = room // block_tokens
        self.model.allocate_cache(block_tokens, self.blocks)
        of = self.model if device.is_cuda else device.threads
        self.executor: Any = self.native.Executor(of)
        self.executor.start()
        self._ids = itertools.count(1)
        self._ended: set[int] = set()

    @property
    def ids(self) -> list[int]:
        """The prompt whose logits are known."""
        return self.saved.ids

    def assert_close(self, got: Logits, tokens: int) -> None:
        """Check the logits after the first so many tokens of the prompt."""
        error = relative_error(got, self.saved.expected[tokens - 1])
        assert error < self.device.tolerance, f"{tokens} tokens: {error}"

    def plan(self, granularity: str, rates: MachineRates | None = None) -> Any:
        """The planner's options; `budget:…` cuts as finely as it can unless rates are given."""
        default = SLOW if granularity.startswith("budget") else MachineRates()
        return plan_options(self.native, Granularity.parse(granularity), rates or default)

    def close(self) -> None:
        """Stop the executor."""
        self.executor.stop()
        self.executor.pop_events()

    def tables(self, sizes: Sequence[int], seed: int = 0) -> list[npt.NDArray[np.int32]]:
        """Disjoint block tables for sequences of so many tokens, blocks scattered at random."""
        order = np.random.default_rng(seed).permutation(self.blocks).astype(np.int32)
        tables, start = [], 0
        for size in sizes:
            count = -(-size // self.block_tokens)
            tables.append(order[start : start + count])
            start += count
        assert start <= self.blocks, "the test asks for more blocks than there are"
        return tables

    def make(self, pieces: Sequence[Piece], granularity: str, **hooks: Any) -> Any:
        """Build the run that computes the pieces, packed."""
        tokens = np.concatenate([np.asarray(ids, dtype=np.int32) for ids, _, _ in pieces])
        sequences = [
            self.native.BatchSequence(rows=len(ids), context=context, block_table=table)
            for ids, context, table in pieces
        ]
        batch = self.native.Batch(tokens, sequences)
        return self.model.make_run(next(self._ids), batch, self.plan(granularity), **hooks)

    def wait(self, run: Any, *states: str) -> None:
        """Sleep until the run is in one of the states."""
        deadline = time.monotonic() + 100.0
        while run.state not in states or not self._is_event_taken(run):
            assert time.monotonic() < deadline, f"run is {run.state}, waited for {states}"
            # A suspended run's event comes just before its state: so not only on the event.
            select.select([self.executor.event_fd], [], [], 0.002)

    def _is_event_taken(self, run: Any) -> bool:
        """Take events; one left in the queue would keep its run, and that its workspace."""
        self._ended.update(
            event.run.id for event in self.executor.pop_events() if event.kind != "suspended"
        )
        return run.state in ("ready", "running", "suspended") or run.id in self._ended

    def advance(self, run: Any, boundary: int) -> None:
        """Dispatch a run that pauses at this boundary, and wait until it stands there."""
        self.executor.dispatch(run)
        while run.cursor < boundary:
            self.wait(run, "suspended", "failed")
            assert run.state != "failed", run.error
        self.wait(run, "suspended")
        assert run.cursor == boundary

    def execute(self, run: Any) -> Logits:
        """Execute a run to its end; returns its logits."""
        self.executor.dispatch(run)
        self.wait(run, "finished", "cancelled", "failed")
        assert run.state == "finished", run.error
        logits: Logits = self.native.logits(run).copy()
        return logits

    def logits(self, pieces: Sequence[Piece], granularity: str) -> Logits:
        """Compute the pieces packed in one run; one row of logits per piece."""
        return self.execute(self.make(pieces, granularity))

    def prefill(self, ids: list[int], granularity: str, seed: int = 0) -> Logits:
        """Logits after one whole prompt, in blocks of its own."""
        row: Logits = self.logits([(ids, 0, self.tables([len(ids)], seed)[0])], granularity)[0]
        return row
