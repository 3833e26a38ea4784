"""A family that a user adds at run time, in one Python file: right, and preempted bit-equal."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import parallel_family
import pytest
import torch
from cases import Logits, Runner, Saved
from devices import ONE, Device, on
from safetensors.torch import save_file
from test_preemption import stop_everywhere
from torch.nn.functional import scaled_dot_product_attention, silu

from flowprefill.models.families import Family, register
from flowprefill.models.families.llama import read_llama

Tensors = dict[str, torch.Tensor]
CONFIG = {
    "model_type": "parallel",
    "architectures": ["ParallelForCausalLM"],
    "vocab_size": 100,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "residual_multiplier": 0.4,
}
IDS = np.random.default_rng(3).integers(0, 100, 200).tolist()


def random_tensors(hidden: int = 48, inner: int = 88) -> Tensors:
    """Return a checkpoint's tensors by Hugging Face's names."""
    shapes = {"norm": (hidden,), "self_attn.norm": (hidden,), "self_attn.q_proj": (hidden, hidden),
              "self_attn.k_proj": (hidden // 2, hidden), "self_attn.v_proj": (hidden // 2, hidden),
              "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (inner, hidden),
              "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}  # fmt: skip
    found = {f"model.layers.{i}.{name}.weight": s for i in (0, 1) for name, s in shapes.items()}
    found |= {"model.embed_tokens.weight": (100, hidden), "lm_head.weight": (100, hidden)}
    found |= {"model.norm.weight": (hidden,)}
    torch.manual_seed(4)
    return {
        name: torch.randn(shape) * 0.2 + (1.0 if len(shape) == 1 else 0.0)
        for name, shape in found.items()
    }


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def turned(x: torch.Tensor) -> torch.Tensor:
    """Rotate [tokens, heads, head_dim] by position."""
    half = x.shape[-1] // 2
    angles = torch.arange(len(x))[:, None, None] * 10_000.0 ** -(torch.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


def reference(tensors: Tensors, ids: list[int]) -> Logits:
    """Logits of every position, written out: what the family is meant to compute."""
    hidden = tensors["model.embed_tokens.weight"][ids]
    head_dim = hidden.shape[1] // 4
    for i in (0, 1):
        names = ("norm", "self_attn.norm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
        w = {name: tensors[f"model.layers.{i}.{name}.weight"] for name in names}
        proj = {n: tensors[f"model.layers.{i}.self_attn.{n}_proj.weight"] for n in "qkvo"}
        x = rms_norm(hidden, w["norm"])
        q, k, v = ((x @ proj[n].T).reshape(len(ids), -1, head_dim) for n in "qkv")
        q, k, v = (t.transpose(0, 1) for t in (turned(q), turned(k), v))
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        attention = mixed.transpose(0, 1).flatten(1) @ proj["o"].T
        gated = silu(x @ w["mlp.gate_proj"].T) * (x @ w["mlp.up_proj"].T)
        mlp = gated @ w["mlp.down_proj"].T
        hidden = hidden + 0.4 * rms_norm(attention, w["self_attn.norm"]) + 0.4 * mlp
    logits: Logits = (
        rms_norm(hidden, tensors["model.norm.weight"]) @ tensors["lm_head.weight"].T
    ).numpy()
    return logits


@pytest.fixture
def native(device: Device, tmp_path: Path) -> Iterator[Runner]:
    """The family's model on the test's device, at sizes that its kernels take."""
    hidden, inner = (256, 208) if device.is_cuda else (48, 88)
    tensors = random_tensors(hidden, inner)
    if device.is_cuda:
        tensors = {name: values.bfloat16().float() for name, values in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    config = CONFIG | {"hidden_size": hidden, "intermediate_size": inner}
    (tmp_path / "config.json").write_text(json.dumps(config))
    opened = Runner(device, Saved(tmp_path, IDS, reference(tensors, IDS)))
    yield opened
    opened.close()


@pytest.mark.parametrize("granularity", ["none", "operator", "chunk:32", "budget:0.1"])
@on(ONE)
def test_logits_are_those_of_the_family(native: Runner, granularity: str) -> None:
    for tokens in (1, 17, 64, 129, 200):
        native.assert_close(native.prefill(IDS[:tokens], granularity, tokens), tokens)


@pytest.mark.parametrize("granularity", ["layer", "operator", "budget:0.1"])
@on(ONE)
def test_it_stops_at_every_boundary_and_keeps_its_bits(native: Runner, granularity: str) -> None:
    stop_everywhere(native, granularity)


def test_a_taken_model_type_is_refused() -> None:
    register(parallel_family.FAMILY)  # once more: the same
    other = Family(model_type="llama", architecture="OtherForCausalLM", read=read_llama)
    with pytest.raises(ValueError, match="model_type: got 'llama', expected one that no family"):
        register(other)
