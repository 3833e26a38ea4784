"""Checkpoints for `bench prefill --peers`: folders that every engine can open, made once.

A process of its own (`python -m flowprefill.bench.peer_models NAME FOLDER`), since torch's threads
would slow the engine that is measured later. A shape with random weights, or the default model's
own weights in transformers' form.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from flowprefill.models.registry import DEFAULT_MODEL

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
VOCAB_SIZE = 151_936
MAX_POSITION = 32_768
SPREAD = 0.02  # standard deviation of random weights
TOKENIZER = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
}
NAMES = (DEFAULT_MODEL, *SHAPES)


def make(name: str, folder: Path) -> None:
    """Write the checkpoint, with the default model's tokenizer, into a folder that is not there.

    Args:
        name: one of NAMES.
    """
    import torch
    import transformers

    from flowprefill.bench.transformers_model import TransformersModel
    from flowprefill.models.checkpoint import open_checkpoint

    if name in SHAPES:
        config = transformers.Qwen2Config(
            vocab_size=VOCAB_SIZE, max_position_embeddings=MAX_POSITION, initializer_range=SPREAD,
            pad_token_id=None, bos_token_id=1, eos_token_id=2, **SHAPES[name],
        )  # fmt: skip
        torch.manual_seed(1)
        model: Any = transformers.Qwen2ForCausalLM(config)
        model.to(torch.bfloat16)
    else:
        model = TransformersModel(name, "bf16", torch.get_num_threads()).inner
    unfinished = folder.with_suffix(".unfinished")
    model.save_pretrained(unfinished)
    open_checkpoint(DEFAULT_MODEL).tokenizer._inner.save(str(unfinished / "tokenizer.json"))
    (unfinished / "tokenizer_config.json").write_text(json.dumps(TOKENIZER))
    unfinished.rename(folder)


if __name__ == "__main__":
    make(sys.argv[1], Path(sys.argv[2]))
