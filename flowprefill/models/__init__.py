"""Checkpoints on disk: model configuration, weights, tokenizer and chat template."""
