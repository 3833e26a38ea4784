"""Checkpoints for `bench prefill --peers`: folders that every engine can open, made once.

A process of its own (`python -m flowprefill.bench.peer_models NAME FOLDER [BF16|Q8_0 ...]`), since
torch's threads would slow the engine that is measured later. A shape with random weights, or the
default model's own weights, in transformers' form; for llama.cpp also as GGUF files.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowprefill.models.registry import DEFAULT_MODEL

if TYPE_CHECKING:
    import gguf

    from flowprefill.models.model_config import ModelConfig

# Qwen2's, as published; the weights are random.
SHAPES: dict[str, dict[str, Any]] = {
    "random-0.5b": {
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
    "random-1.5b": {
        "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
        "num_attention_heads": 12, "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
}  # fmt: skip
# Qwen3-MoE's kind: 1.1 billion parameters, of which a row computes 0.2 and the head.
MIXTURES: dict[str, dict[str, Any]] = {
    "random-moe": {
        "hidden_size": 1024, "num_hidden_layers": 12, "num_attention_heads": 16,
        "num_key_value_heads": 4, "head_dim": 64, "num_experts": 32, "num_experts_per_tok": 4,
        "moe_intermediate_size": 768, "norm_topk_prob": True, "tie_word_embeddings": True,
    },
}  # fmt: skip
VOCAB_SIZE = 151_936
MAX_POSITION = 32_768
SPREAD = 0.02  # standard deviation of random weights
TOKENIZER = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
}
NAMES = (DEFAULT_MODEL, *SHAPES, *MIXTURES)


def make(name: str, folder: Path) -> None:
    """Write the checkpoint, with the default model's tokenizer, into a folder that is not there.

    Args:
        name: one of NAMES.
    """
    import torch
    import transformers

    from flowprefill.bench.transformers_model import TransformersModel
    from flowprefill.models.checkpoint import open_checkpoint

    if name in SHAPES or name in MIXTURES:
        kind = transformers.Qwen2Config if name in SHAPES else transformers.Qwen3MoeConfig
        config = kind(
            vocab_size=VOCAB_SIZE, max_position_embeddings=MAX_POSITION, initializer_range=SPREAD,
            pad_token_id=None, bos_token_id=1, eos_token_id=2, **(SHAPES | MIXTURES)[name],
        )  # fmt: skip
        torch.manual_seed(1)
        auto_class: Any = transformers.AutoModelForCausalLM
        model: Any = auto_class.from_config(config)
        model.to(torch.bfloat16)
    else:
        model = TransformersModel(name, "bf16", torch.get_num_threads()).inner
    unfinished = folder.with_suffix(".unfinished")
    model.save_pretrained(unfinished)
    open_checkpoint(DEFAULT_MODEL).tokenizer._inner.save(str(unfinished / "tokenizer.json"))
    (unfinished / "tokenizer_config.json").write_text(json.dumps(TOKENIZER))
    unfinished.rename(folder)


def write_gguf(folder: Path, kind: str) -> None:
    """Write ``KIND.gguf`` into a checkpoint's folder: without a tokenizer, for prompts are ids.

    Args:
        folder: of a Llama, Qwen2 or Qwen3-MoE.
        kind: name of the matrices' type: one that the gguf package can write; vectors are F32.
    """
    import gguf
    import numpy as np
    import torch

    from flowprefill.models.checkpoint import open_checkpoint
    from flowprefill.models.families import family_of
    from flowprefill.models.weight_names import gguf_name

    checkpoint = open_checkpoint(folder)
    form = family_of(checkpoint.config).gguf
    assert form is not None  # of all NAMES
    matrices = gguf.GGMLQuantizationType[kind]
    unfinished = folder / f"{kind}.unfinished"
    writer = gguf.GGUFWriter(unfinished, form.architecture)
    _add_header(writer, checkpoint.config)
    experts: list[np.ndarray] = []  # of the tensor that is next
    for name, tensor in checkpoint.weights():
        # Where form.arrange takes each row from: the file has them the other way round.
        rows = torch.arange(len(tensor)).unsqueeze(1)
        order = form.arrange(checkpoint.config, name, rows).flatten().argsort()
        values = tensor[order].float().numpy()
        stored_name, _, expert = gguf_name(name).partition("[")
        if expert:  # all in one tensor, one after another
            experts.append(values)
            if len(experts) < checkpoint.config.num_experts:
                continue
            values, experts = np.stack(experts), []
        is_matrix = values.ndim > 1 and not name.endswith("router")
        stored = matrices if is_matrix else gguf.GGMLQuantizationType.F32
        writer.add_tensor(stored_name, gguf.quants.quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    unfinished.rename(folder / f"{kind}.gguf")


def _add_header(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_eps)
    writer.add_rope_freq_base(config.rope_theta)
    if config.num_experts:
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.experts_per_token)
        writer.add_expert_feed_forward_length(config.expert_size)
    writer.add_tokenizer_model("no_vocab")


def main() -> None:
    """Make what is not there yet."""
    name, folder, *kinds = sys.argv[1:]
    if not Path(folder).exists():
        make(name, Path(folder))
    for kind in kinds:
        write_gguf(Path(folder), kind)


if __name__ == "__main__":
    main()
