"""Checkpoint: configuration, tokenizer, chat template and streamed weights of one model on disk.

The engine calls open_checkpoint; the format readers (hf_folder, gguf_file) supply the parts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import gguf
import torch

from flowprefill.errors import CheckpointError
from flowprefill.models.chat_template import ChatTemplate
from flowprefill.models.families import build_graph
from flowprefill.models.model_config import ModelConfig
from flowprefill.models.tokenizer import Tokenizer

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]


class CheckpointReader(Protocol):
    """One file format: what a reader of it must be able to say."""

    @property
    def config(self) -> ModelConfig:
        """The model's configuration, read when the checkpoint was opened."""

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """Texts that chat templates may name, ``bos_token`` and its like; absent if unknown."""

    @property
    def chat_templates(self) -> Mapping[str, str]:
        """Templates by name: ``default``, and perhaps ``tool_use`` for chats with tools."""

    @property
    def sampling_defaults(self) -> Mapping[str, Any]:
        """How the model is to be sampled where a request does not say; see sampling_defaults.py."""

    def read_tokenizer(self) -> Tokenizer:
        """Build the tokenizer; raises CheckpointError."""

    def stored_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every stored tensor, by the file's own name, without reading it."""

    def stored_name(self, canonical: str) -> str:
        """The file's own name of a canonical weight."""

    def is_ignored(self, stored: str) -> bool:
        """Whether a stored tensor is known not to be needed."""

    def stored_bytes(self, stored: str) -> int:
        """Size on disk, bytes; what progress counts."""

    def stored_type(self, stored: str) -> str:
        """Name of a tensor's quantised type, as GGUF has it, or E4M3; empty where it is in none."""

    def load(self, canonical: str) -> torch.Tensor:
        """Read one weight, contiguous, on the CPU; may share memory with the mapped file."""

    def load_blocks(self, canonical: str) -> torch.Tensor:
        """Read one quantised weight as it is: uint8 [rows, bytes of a row], rows as in load."""

    def release(self, canonical: str) -> None:
        """Take notice that a weight was consumed: its pages need not stay in memory."""


class Checkpoint:
    """One model on disk, its weights checked by name and shape before any is read.

    Attributes:
        name: the id under which the model is served.
        config: see ModelConfig.
        graph: the model as data; its sources are the weights.
    """

    def __init__(self, name: str, reader: CheckpointReader, max_context: int = 0) -> None:
        """Check the stored tensors against the configuration.

        Args:
            max_context: requests will have at most so many tokens; 0: as many as the model takes.

        Raises:
            CheckpointError: a tensor is missing, has the wrong shape, or is not known.
        """
        self.name = name
        config = reader.config
        served = min(max_context or config.max_position, config.max_position)
        self.config = replace(config, rope_scaling=config.rope_scaling.served_up_to(served))
        self._reader = reader
        self._tokenizer: Tokenizer | None = None
        self.graph = build_graph(self.config)
        self._shapes = self.graph.sources()
        self._check_tensors()

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, read on first use; raises CheckpointError naming the missing file."""
        if self._tokenizer is None:
            self._tokenizer = self._reader.read_tokenizer()
            known, own = self.config.vocab_size, self._tokenizer.vocab_size
            if own > known:  # as of models that were given a padding token later
                log.warning(
                    "%s: the tokenizer has %d tokens and the model knows %d: prompts with one of "
                    "the others will be refused. Is it this model's tokenizer?",
                    self.name,
                    own,
                    known,
                )
        return self._tokenizer

    @property
    def chat_template(self) -> ChatTemplate:
        """Renders messages; its ``render`` raises InvalidRequest if the model has no template."""
        texts, names = self._reader.chat_templates, self._reader.special_tokens
        return ChatTemplate(texts.get("default"), names, texts.get("tool_use"))

    @property
    def sampling_defaults(self) -> Mapping[str, Any]:
        """How the model's authors want it sampled, by the names of generation_config.json."""
        return self._reader.sampling_defaults

    @property
    def total_bytes(self) -> int:
        """What the needed weights take on disk, bytes."""
        return sum(self._stored_bytes(name) for name in self._shapes)

    def block_formats(self, types: Collection[str]) -> dict[str, str]:
        """Return the matrices whose quantised type is one of these: canonical name -> type."""
        found = {
            name: self._reader.stored_type(self._reader.stored_name(name))
            for name, shape in self._shapes.items()
            if len(shape) == 2
        }
        return {name: kind for name, kind in found.items() if kind in types}

    def weights(
        self, progress: Progress | None = None, in_blocks: Collection[str] = ()
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Stream the weights in the order of the graph's sources, one held at a time.

        Args:
            progress: called after each weight was consumed with (bytes done, bytes total)
                of the files.
            in_blocks: names that come as they are stored: uint8 [rows, bytes of a row].

        Yields:
            Canonical name and tensor: matrices [out, in]; q and k rows in rotate-half order (pair
            (i, i + head_dim / 2) turns together); stored dtype (bf16, f16, f32) from safetensors,
            float32 from GGUF and where quantised. It may share memory with the mapped file: do not
            write to it.

        Raises:
            CheckpointError: the file could not be read any more.
        """
        total, done = self.total_bytes, 0
        for name in self._shapes:
            load = self._reader.load_blocks if name in in_blocks else self._reader.load
            yield name, load(name)
            self._reader.release(name)
            done += self._stored_bytes(name)
            if progress is not None:
                progress(done, total)

    def _stored_bytes(self, canonical: str) -> int:
        return self._reader.stored_bytes(self._reader.stored_name(canonical))

    def _check_tensors(self) -> None:
        stored = self._reader.stored_shapes()
        needed: set[str] = set()
        for canonical, expected in self._shapes.items():
            name = self._reader.stored_name(canonical)
            needed.add(name)
            if name not in stored:
                raise CheckpointError(
                    f"tensor {name}: missing, expected shape {list(expected)}", param=name
                )
            if stored[name] != expected:
                raise CheckpointError(
                    f"tensor {name}: got shape {list(stored[name])}, expected {list(expected)}",
                    param=name,
                )
        for name in stored:
            if name not in needed and not self._reader.is_ignored(name):
                raise CheckpointError(
                    f"tensor {name}: got shape {list(stored[name])}, expected no such tensor in a "
                    f"{self.config.family} model with this configuration",
                    param=name,
                )


def block_bytes(kind: str) -> float:
    """Bytes of one value in a quantised type of GGUF, its scales included."""
    values, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return size / values


def open_checkpoint(source: str | Path, max_context: int = 0) -> Checkpoint:
    """Open a model by name or path.

    Args:
        source: ``smollm2-135m`` (the embedded default), a Hugging Face folder, a ``.gguf`` file, or
            ``ORG/NAME`` of a downloaded model on the hub.
        max_context: see Checkpoint.

    Raises:
        CheckpointError: nothing there, a part missing or damaged, or a kind that is not supported.
    """
    from flowprefill.models.gguf_file import GgufFile
    from flowprefill.models.hf_folder import HfFolder
    from flowprefill.models.registry import resolve_model

    found = resolve_model(source)
    reader: CheckpointReader = HfFolder(found.path) if found.path.is_dir() else GgufFile(found.path)
    return Checkpoint(found.model_id, reader, max_context)
