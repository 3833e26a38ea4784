"""Models of random weights in known shapes: no file, no download; for `bench gpu --shape`."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np
import torch

from flowprefill.models.checkpoint import Progress
from flowprefill.models.families import build_graph
from flowprefill.models.model_config import ModelConfig


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


class RandomCheckpoint:
    """What fill_model() reads: one random row of numbers, cut to each tensor's shape."""

    def __init__(self, name: str, config: ModelConfig) -> None:
        self.name = f"random {name}"
        self.config = config
        self.graph = build_graph(config)
        self._shapes = self.graph.sources()
        most = max(int(np.prod(shape)) for shape in self._shapes.values())
        piece = torch.randn(1 << 22, generator=torch.Generator().manual_seed(1)) * 0.02
        self._numbers = piece.repeat(-(-most // piece.numel()))
        self._codes = (piece / SCALE).to(torch.float8_e4m3fn).view(torch.uint8)

    def layer_matrices(self) -> list[str]:
        """Return the tensors of the layers' products, which may come in e4m3."""
        return [
            part.source
            for operator, weight in self.graph.product_weights()
            if operator.layer >= 0
            for part in weight.parts
        ]

    def weights(
        self,
        progress: Progress | None = None,  # noqa: ARG002
        in_blocks: Collection[str] = (),
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield each weight; norms are ones. In blocks: rows of e4m3, each with its scale."""
        for name, shape in self._shapes.items():
            if name in in_blocks:
                yield name, self._rows_of_e4m3(*shape)
            elif len(shape) == 1:
                yield name, torch.ones(shape)
            else:
                yield name, self._numbers[: int(np.prod(shape))].reshape(shape)

    def _rows_of_e4m3(self, rows: int, columns: int) -> torch.Tensor:
        """Return uint8 [rows, columns + 4]: codes, then a float."""
        found = torch.empty(rows, columns + 4, dtype=torch.uint8)
        found[:, columns:] = torch.tensor([SCALE]).view(torch.uint8)
        step = max(self._codes.numel() // columns, 1)
        for row in range(0, rows, step):
            count = min(step, rows - row)
            found[row : row + count, :columns] = self._codes[: count * columns].view(count, columns)
        return found
