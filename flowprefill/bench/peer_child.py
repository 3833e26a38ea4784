"""One other engine in a process of its own; executed by its Python for `bench prefill --peers`.

Imports nothing of flowprefill: it may run in another environment. Reads requests as JSON lines on
stdin, ``{"prompts": [[id, ...], ...], "tokens": N}``, generates N tokens for each prompt greedily
and answers ``{"seconds": S}``. The first answer tells the version.

    python peer_child.py transformers|openvino-genai|openvino-int8|vllm|llama-cpp FOLDER THREADS
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

    package = "transformers"

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

    package = "openvino-genai"
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

    package = "vllm"

    def __init__(self, folder: Path, threads: int) -> None:
        """Load the checkpoint; the first start compiles for minutes."""
        cores = sorted(os.sched_getaffinity(0))[:threads]
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
        import vllm

        self._vllm = vllm
        self._llm = vllm.LLM(str(folder), dtype="bfloat16", enable_prefix_caching=False)

    def generate(self, prompts: Prompts, tokens: int) -> None:
        """Generate greedily, whatever the tokens are."""
        params = self._vllm.SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        self._llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)


class LlamaCpp:
    """llama-cpp-python on the .gguf file in the folder; one sequence at a time."""

    package = "llama-cpp-python"

    def __init__(self, folder: Path, threads: int) -> None:
        """Load the file."""
        import llama_cpp

        (file,) = sorted(folder.glob("*.gguf"))
        self._llama = llama_cpp.Llama(
            str(file), n_ctx=8192, n_batch=512, n_threads=threads, n_threads_batch=threads,
            flash_attn=True, verbose=False,
        )  # fmt: skip

    def generate(self, prompts: Prompts, tokens: int) -> None:
        """Generate greedily; refuses a batch, which this binding cannot decode together."""
        (ids,) = prompts
        self._llama.reset()
        self._llama.eval(ids)
        for _ in range(tokens - 1):
            self._llama.eval([self._llama.sample(temp=0.0)])


PEERS: dict[str, Any] = {
    "transformers": Transformers,
    "openvino-genai": OpenVino,
    "openvino-int8": OpenVinoInt8,
    "vllm": Vllm,
    "llama-cpp": LlamaCpp,
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


def main() -> None:
    """Serve requests until stdin ends; what libraries print goes to stderr."""
    name, folder, threads = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    peer = PEERS[name](Path(folder), int(threads))
    version = importlib.metadata.version(peer.package)
    print(json.dumps({"version": version}), file=answers, flush=True)
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
