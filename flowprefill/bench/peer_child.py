"""One other engine in a process of its own; executed by its Python for `bench prefill --peers`.

Imports nothing of flowprefill: it may run in another environment. Reads requests as JSON lines on
stdin, ``{"prompts": [[id, ...], ...], "tokens": N}``, generates N tokens for each prompt greedily
and answers ``{"seconds": S}``. The first answer tells the version.

    python peer_child.py transformers|openvino-genai|openvino-int8|vllm|llama-cpp|llama-cpp-int8 \
        FOLDER THREADS
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

Prompts = list[list[int]]


class Transformers:
    """AutoModelForCausalLM with sdpa, in bf16."""

    module = "transformers"

    def __init__(self, folder: Path, threads: int) -> None:
        """Load the checkpoint."""
        import torch
        import transformers

        torch.set_num_threads(threads)
        self._torch: Any = torch
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, attn_implementation="sdpa"
        )

    def generate(self, prompts: Prompts, tokens: int) -> None:
        """Decode by the forward call itself: what generate() adds is not counted."""
        ids = self._torch.tensor(prompts)
        cache = None
        with self._torch.inference_mode():
            for _ in range(tokens):
                out = self._model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache, ids = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)


class OpenVino:
    """LLMPipeline; the checkpoint is exported once into its folder."""

    module = "openvino_genai"
    weights = "fp16"

    def __init__(self, folder: Path, threads: int) -> None:
        """Export the checkpoint if need be, and load it."""
        import numpy as np
        import openvino
        import openvino_genai

        exported = folder / f"openvino-{self.weights}"
        if not (exported / "openvino_model.xml").exists():
            _export(folder, exported, self.weights)
        self._numpy, self._openvino, self._genai = np, openvino, openvino_genai
        self._pipeline = openvino_genai.LLMPipeline(
            str(exported), "CPU", INFERENCE_NUM_THREADS=threads
        )

    def generate(self, prompts: Prompts, tokens: int) -> None:
        """Generate greedily, whatever the tokens are."""
        ids = self._openvino.Tensor(self._numpy.array(prompts, dtype=self._numpy.int64))
        ones = self._openvino.Tensor(self._numpy.ones_like(ids.data))
        config = self._genai.GenerationConfig(
            max_new_tokens=tokens, ignore_eos=True, do_sample=False
        )
        self._pipeline.generate(self._genai.TokenizedInputs(ids, ones), config)


class OpenVinoInt8(OpenVino):
    """The same with weights of 8 bits."""

    weights = "int8"


class Vllm:
    """vllm.LLM as it compiles by default; its CPU build reads threads from the environment."""

    module = "vllm"

    def __init__(self, folder: Path, threads: int) -> None:
        """Load the checkpoint; the first start compiles for minutes."""
        cores = sorted(os.sched_getaffinity(0))[:threads]
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # it sends nothing home
        import vllm

        self._vllm = vllm
        self._llm = vllm.LLM(str(folder), dtype="bfloat16", enable_prefix_caching=False)

    def generate(self, prompts: Prompts, tokens: int) -> None:
        """Generate greedily, whatever the tokens are."""
        params = self._vllm.SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        self._llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)


class LlamaCpp:
    """llama.cpp by the functions of its library: the binding's own class decodes one sequence."""

    module = "llama_cpp"
    weights = "BF16"  # as the gguf package calls the type
    context = 8192  # tokens of a single sequence
    batch_context = 512  # of each of several, whose room is taken for all of them

    def __init__(self, folder: Path, threads: int) -> None:
        """Load the file.

        Raises:
            ValueError: llama.cpp cannot load it; its own words are on stderr.
        """
        import llama_cpp
        import numpy as np

        self._numpy, self._llama, self._threads = np, llama_cpp, threads
        # It would print every tensor of its graph. The library calls it as long as it runs.
        self._log = llama_cpp.llama_log_callback(_print_warning)
        llama_cpp.llama_log_set(self._log, None)
        llama_cpp.llama_backend_init()
        settings = llama_cpp.llama_model_default_params()
        path = folder / f"{self.weights}.gguf"
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), settings)
        if not self._model:
            raise ValueError(f"{path}: llama.cpp cannot load it")
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(
            llama_cpp.llama_model_get_vocab(self._model)
        )
        self._contexts: dict[int, Any] = {}  # by the number of sequences

    def generate(self, prompts: Prompts, tokens: int) -> None:
        """Generate greedily for prompts of one length."""
        context = self._context(len(prompts))
        self._llama.llama_memory_clear(self._llama.llama_get_memory(context), False)
        position, ids = 0, prompts
        for _ in range(tokens):
            chosen = self._step(context, ids, position)
            position += len(ids[0])
            ids = [[token] for token in chosen]

    def _context(self, sequences: int) -> Any:
        if sequences not in self._contexts:
            settings = self._llama.llama_context_default_params()
            settings.n_seq_max = sequences
            settings.n_ctx = self.context if sequences == 1 else sequences * self.batch_context
            settings.n_batch = settings.n_ctx  # what one call takes; it computes n_ubatch at a time
            settings.n_threads = settings.n_threads_batch = self._threads
            settings.flash_attn_type = self._llama.LLAMA_FLASH_ATTN_TYPE_ENABLED
            self._contexts[sequences] = self._llama.llama_init_from_model(self._model, settings)
        return self._contexts[sequences]

    def _step(self, context: Any, ids: Prompts, position: int) -> list[int]:
        """Compute these tokens of each sequence from a position on; the most likely next ones."""
        batch = self._llama.llama_batch_init(sum(map(len, ids)), 0, 1)
        ends = []
        for sequence, new in enumerate(ids):
            for offset, token in enumerate(new):
                at = batch.n_tokens
                batch.token[at], batch.pos[at] = token, position + offset
                batch.n_seq_id[at], batch.seq_id[at][0] = 1, sequence
                batch.logits[at] = offset == len(new) - 1
                batch.n_tokens += 1
            ends.append(batch.n_tokens - 1)
        status = self._llama.llama_decode(context, batch)
        self._llama.llama_batch_free(batch)
        if status != 0:
            raise ValueError(f"llama_decode returned {status}")
        rows = (self._llama.llama_get_logits_ith(context, end) for end in ends)
        shape = (self._vocab_size,)
        return [int(self._numpy.ctypeslib.as_array(row, shape).argmax()) for row in rows]


class LlamaCppInt8(LlamaCpp):
    """The same with weights of 8 bits."""

    weights = "Q8_0"


def _print_warning(level: int, text: bytes, _: Any) -> None:
    if level in (3, 4):  # ggml's warning and error
        sys.stderr.write(text.decode(errors="replace"))


PEERS: dict[str, Any] = {
    "transformers": Transformers,
    "openvino-genai": OpenVino,
    "openvino-int8": OpenVinoInt8,
    "vllm": Vllm,
    "llama-cpp": LlamaCpp,
    "llama-cpp-int8": LlamaCppInt8,
}


def _export(folder: Path, exported: Path, weights: str) -> None:
    tool = str(Path(sys.executable).with_name("optimum-cli"))
    subprocess.run(
        [
            tool, "export", "openvino", "--model", str(folder), "--weight-format", weights,
            "--task", "text-generation-with-past", str(exported),
        ],
        check=True, stdout=sys.stderr,
    )  # fmt: skip


def _version(module: str) -> str:
    """Version of the installed package; vLLM's for CPUs has a name of its own."""
    return importlib.metadata.version(importlib.metadata.packages_distributions()[module][0])


def main() -> None:
    """Serve requests until stdin ends; what libraries print goes to stderr."""
    name, folder, threads = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    peer = PEERS[name](Path(folder), int(threads))
    print(json.dumps({"version": _version(peer.module)}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        start_s = time.perf_counter()
        try:
            peer.generate(request["prompts"], request["tokens"])
            answer: dict[str, Any] = {"seconds": time.perf_counter() - start_s}
        except Exception as error:  # what a foreign engine raises is its own affair
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
