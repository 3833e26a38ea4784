"""Tiny random checkpoints of the shapes that the kernels take, and a runner of runs on the GPU."""

from __future__ import annotations

import itertools
import select
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers

from flowprefill import _core
from flowprefill.config import Granularity
from flowprefill.engine.device_choice import cuda_module
from flowprefill.engine.loading import fill_model, load_model, plan_options
from flowprefill.models.checkpoint import open_checkpoint
from flowprefill.scheduling.cost_model import MachineRates

Logits = npt.NDArray[np.float32]

VOCAB = 515  # a multiple of nothing
BLOCK_TOKENS = 16
BLOCKS_OF_ONE = 20  # of each sequence
SEQUENCES = 6
LONGEST = BLOCK_TOKENS * BLOCKS_OF_ONE
PATIENCE_S = 60.0
# Of bf16's 8 bits, after a few layers of rounding, against float32: a share of the largest logit.
TOLERANCE = 0.06

TINY = {
    "vocab_size": VOCAB, "hidden_size": 128, "intermediate_size": 208, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
    "tie_word_embeddings": False,
}  # fmt: skip
# name -> (configuration, what differs from TINY)
CASES: dict[str, tuple[type[transformers.PretrainedConfig], dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, {}),
    "llama-wide-heads": (
        transformers.LlamaConfig,
        {"head_dim": 128, "num_attention_heads": 4, "num_key_value_heads": 1},
    ),
    "llama-biases": (transformers.LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "qwen2": (transformers.Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (transformers.Qwen3Config, {}),
    "mistral-window": (transformers.MistralConfig, {"sliding_window": 40}),
}
# Rates at which a GPU would be so slow that every budget cuts everything up.
SLOW = MachineRates(2e6, 1e6, 1e6, 1e-4)


def save_checkpoint(case: str, folder: Path) -> None:
    """Save random weights, rounded to bf16 so that all devices compute with the same."""
    make_config, settings = CASES[case]
    config = make_config(**(TINY | settings))
    torch.manual_seed(5)
    make: Any = transformers.AutoModelForCausalLM.from_config
    model = make(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape) * 0.15 + ("norm" in name)
            parameter.copy_(values.bfloat16().float())
    model.save_pretrained(folder)
    open_checkpoint("smollm2-135m").tokenizer._inner.save(str(folder / "tokenizer.json"))


def prompt_of(tokens: int, seed: int = 0) -> list[int]:
    """Random token ids."""
    return [int(i) for i in np.random.default_rng(seed).integers(3, VOCAB, tokens)]


def plan(granularity: str, native: Any = None) -> Any:
    """The planner's options for the GPU's module; `budget:…` cuts as finely as it can."""
    rates = SLOW if granularity.startswith("budget") else MachineRates()
    return plan_options(native or cuda_module()[0], Granularity.parse(granularity), rates)


def cpu_logits(folder: Path, ids: list[int]) -> Logits:
    """Logits after the prompt by the engine's own CPU model in float32, [vocab]."""
    model = load_model(open_checkpoint(folder), "f32", 1)
    blocks = -(-len(ids) // BLOCK_TOKENS)
    model.allocate_cache(BLOCK_TOKENS, blocks)
    executor = _core.Executor(1)
    executor.start()
    table = np.arange(blocks, dtype=np.int32)
    tokens = np.array(ids, dtype=np.int32)
    sequence = _core.BatchSequence(rows=len(ids), context=0, block_table=table)
    run = model.make_run(1, _core.Batch(tokens, [sequence]), plan("none", _core))
    executor.dispatch(run)
    while run.state != "finished":
        select.select([executor.event_fd], [], [], 0.01)
    row: Logits = _core.logits(run)[0].copy()
    executor.stop()
    return row


class Runner:
    """A model on the first GPU, a cache for SEQUENCES prompts, and an executor."""

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        module, _ = cuda_module()
        assert module is not None, "the marker gpu was forgotten"
        self.cuda: Any = module
        checkpoint = open_checkpoint(folder)
        sizes = {"max_tokens": 2 * LONGEST, "max_sequences": SEQUENCES, "max_context": LONGEST}
        self.model: Any = module.Model(checkpoint.graph, sizes | options)
        fill_model(self.model, checkpoint)
        self.model.allocate_cache(BLOCK_TOKENS, SEQUENCES * BLOCKS_OF_ONE)
        self.executor: Any = module.Executor(self.model)
        self.executor.start()
        self._ids = itertools.count(1)
        self._ended: set[int] = set()

    def close(self) -> None:
        """Stop the executor."""
        self.executor.stop()
        self.executor.pop_events()

    def make(self, ids: list[int], sequence: int, options: Any, **hooks: Any) -> Any:
        """Make the run that prefills a prompt into its sequence's blocks, which lie scattered."""
        order = np.random.default_rng(1).permutation(SEQUENCES * BLOCKS_OF_ONE).astype(np.int32)
        table = order[sequence * BLOCKS_OF_ONE : (sequence + 1) * BLOCKS_OF_ONE]
        tokens = np.array(ids, dtype=np.int32)
        sequence = self.cuda.BatchSequence(rows=len(ids), context=0, block_table=table)
        batch = self.cuda.Batch(tokens, [sequence])
        return self.model.make_run(next(self._ids), batch, options, **hooks)

    def wait(self, run: Any, *states: str) -> None:
        """Wait until the run is in one of the states, and its terminal event has been taken."""
        deadline_s = time.monotonic() + PATIENCE_S
        while run.state not in states or (run.state != "suspended" and run.id not in self._ended):
            assert time.monotonic() < deadline_s, f"run is {run.state}, waited for {states}"
            select.select([self.executor.event_fd], [], [], 0.002)
            events = self.executor.pop_events()
            self._ended.update(event.run.id for event in events if event.kind != "suspended")

    def advance(self, run: Any, boundary: int) -> None:
        """Dispatch a run that pauses at this boundary, and wait until it stands there."""
        self.executor.dispatch(run)
        while run.cursor < boundary:
            self.wait(run, "suspended", "failed")
            assert run.state != "failed", run.error
        self.wait(run, "suspended")
        assert run.cursor == boundary

    def finish(self, run: Any) -> Logits:
        """Execute a run to its end; returns its logits, [vocab]."""
        self.executor.dispatch(run)
        self.wait(run, "finished", "cancelled", "failed")
        assert run.state == "finished", run.error
        row: Logits = self.cuda.logits(run)[0].copy()
        return row

    def logits(self, ids: list[int], sequence: int = 0, granularity: str = "operator") -> Logits:
        """Logits after a prompt that nobody disturbs."""
        return self.finish(self.make(ids, sequence, plan(granularity)))
