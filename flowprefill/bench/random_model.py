"""Models of random weights in known shapes: no file, no download; for benches with `--shape`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import tokenizers
import torch

from flowprefill.models.checkpoint import Checkpoint
from flowprefill.models.families import build_graph
from flowprefill.models.model_config import ModelConfig
from flowprefill.models.tokenizer import Tokenizer, byte_of_character


def llama_8b(layers: int = 32) -> ModelConfig:
    """Return the configuration of Llama-3.1-8B, or of its first layers."""
    return ModelConfig(
        family="llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336,
        num_layers=layers, num_heads=32, num_kv_heads=8, head_dim=128, rms_eps=1e-5,
        rope_theta=500000.0, max_position=131072,
    )  # fmt: skip


def tiny(layers: int = 2) -> ModelConfig:
    """Return a configuration to try the bench itself with."""
    return ModelConfig(
        family="llama", vocab_size=515, hidden_size=128, intermediate_size=208, num_layers=layers,
        num_heads=4, num_kv_heads=2, head_dim=64, rms_eps=1e-5, rope_theta=1e4, max_position=2048,
    )  # fmt: skip


# By name, with all layers or the first ones.
SHAPES = {"llama-3.1-8b": llama_8b, "tiny": tiny}


SCALE = 3e-4  # of every row of e4m3: weights are then about as large as in bf16


class RandomReader:
    """A CheckpointReader of no file: one random row of numbers, cut to each tensor's shape."""

    special_tokens: Mapping[str, str] = {}
    chat_templates: Mapping[str, str] = {}
    sampling_defaults: Mapping[str, Any] = {}

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self._shapes = build_graph(config).sources()
        most = max(int(np.prod(shape)) for shape in self._shapes.values())
        piece = torch.randn(1 << 22, generator=torch.Generator().manual_seed(1)) * 0.02
        self._numbers = piece.repeat(-(-most // piece.numel()))
        self._codes = (piece / SCALE).to(torch.float8_e4m3fn).view(torch.uint8)

    def read_tokenizer(self) -> Tokenizer:
        """Return one with a token for each byte; ids beyond these have no text."""
        inner = tokenizers.Tokenizer(tokenizers.models.BPE(byte_of_character(), []))
        inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = tokenizers.decoders.ByteLevel()
        return Tokenizer(inner)

    def stored_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return the model's own tensors."""
        return self._shapes

    def stored_name(self, canonical: str) -> str:
        """Return the same name."""
        return canonical

    def is_ignored(self, stored: str) -> bool:  # noqa: ARG002
        """Nothing is: every tensor is the model's."""
        return False

    def stored_bytes(self, stored: str) -> int:
        """Return bytes as float32."""
        return 4 * int(np.prod(self._shapes[stored]))

    def stored_type(self, stored: str) -> str:  # noqa: ARG002
        """None is quantised."""
        return ""

    def load(self, canonical: str) -> torch.Tensor:
        """Return float32; norms are ones."""
        shape = self._shapes[canonical]
        if len(shape) == 1:
            return torch.ones(shape)
        return self._numbers[: int(np.prod(shape))].reshape(shape)

    def load_blocks(self, canonical: str) -> torch.Tensor:
        """Return rows of e4m3, each with its scale: uint8 [rows, columns + 4], codes first."""
        rows, columns = self._shapes[canonical]
        found = torch.empty(rows, columns + 4, dtype=torch.uint8)
        found[:, columns:] = torch.tensor([SCALE]).view(torch.uint8)
        step = max(self._codes.numel() // columns, 1)
        for row in range(0, rows, step):
            count = min(step, rows - row)
            found[row : row + count, :columns] = self._codes[: count * columns].view(count, columns)
        return found

    def release(self, canonical: str) -> None:
        """All tensors share the numbers: nothing is to be freed."""


class RandomCheckpoint(Checkpoint):
    """A model of random weights; an engine, or fill_model(), takes it like one on disk."""

    def __init__(self, shape: str, config: ModelConfig) -> None:
        """Draw the numbers; always the same.

        Args:
            shape: its name, for reports.
        """
        super().__init__(f"random {shape}", RandomReader(config))

    def layer_matrices(self) -> list[str]:
        """Return the tensors of the layers' products, which may come in e4m3."""
        return [
            part.source
            for operator, weight in self.graph.product_weights()
            if operator.layer >= 0
            for part in weight.parts
        ]

    def layer_products(self) -> dict[str, tuple[int, int]]:
        """Return (columns, depth) of the products of one layer."""
        weights = {weight.name: weight for weight in self.graph.weights}
        found = {}
        for op, _ in self.graph.products():
            if op.layer == 0:
                weight = weights[op.weight]
                found[op.name] = (sum(part.rows for part in weight.parts), weight.columns)
        return found
