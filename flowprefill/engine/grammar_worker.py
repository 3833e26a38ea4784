"""Compiles grammars to see whether it ends; grammar_process.py starts it as a script.

It imports llguidance and the standard library alone. Requests and replies are lines of JSON on its
standard input and output: a grammar as llguidance takes it, and true once it was compiled, well
or not.
"""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from typing import IO

import llguidance

CPU_LIMIT_S = 1
MEMORY_LIMIT_BYTES = 1 << 29
EOS = 256
# Far below llguidance's own: what these refuse no client has sent in earnest.
LIMITS = llguidance.LLParserLimits(
    max_items_in_row=1000,
    initial_lexer_fuel=400_000,
    step_lexer_fuel=100_000,
    step_max_items=20_000,
    max_lexer_states=50_000,
    max_grammar_size=100_000,
    verbose_errors=False,
)


class ByteTokens:
    """A vocabulary of the 256 bytes and an end: compiling hardly depends on the vocabulary."""

    eos_token_id = EOS
    bos_token_id = None
    tokens = (*(bytes([byte]) for byte in range(256)), b"<eos>")
    special_token_ids = (EOS,)

    def __call__(self, text: bytes) -> list[int]:
        """Tokenise."""
        return list(text)


def error_of(matcher: llguidance.LLMatcher) -> str:
    """Return why a matcher cannot be used, or nothing."""
    if not matcher.is_error():
        return ""
    return matcher.get_error().removesuffix("<non-verbose/>").strip() or "cannot be compiled"


def compile_once(tokenizer: llguidance.LLTokenizer, grammar: str) -> None:
    """Compile a grammar and take its first step."""
    matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=LIMITS)
    if not matcher.is_error():
        matcher.compute_bitmask()


def serve(requests: IO[str], replies: IO[str]) -> None:
    """Answer requests until the other side closes."""
    tokenizer = llguidance.LLTokenizer(
        llguidance.TokenizerWrapper(ByteTokens()), n_vocab=EOS + 1, eos_token=EOS, slices=[]
    )
    for line in requests:
        # The system ends this process if the grammar computes for too long.
        most = math.ceil(time.process_time() + CPU_LIMIT_S)
        resource.setrlimit(resource.RLIMIT_CPU, (most, resource.RLIM_INFINITY))
        compile_once(tokenizer, json.loads(line))
        replies.write("true\n")
        replies.flush()


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    serve(sys.stdin, sys.stdout)
