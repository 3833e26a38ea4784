"""Tries whether compiling a grammar ends; grammar_process.py has a BoundedProcess run it.

It imports llguidance and the standard library alone. A request is a grammar as llguidance takes it;
the reply is empty, and comes once the grammar was compiled, well or not.
"""

from __future__ import annotations

import functools

import llguidance

EOS = 256
UNFULFILLABLE = "no text fulfils it"
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
    why: str = matcher.get_error().removesuffix("<non-verbose/>").strip()
    return UNFULFILLABLE if why == "NoExtensionBias" else why or "cannot be compiled"


@functools.cache
def _tokenizer() -> llguidance.LLTokenizer:
    wrapper = llguidance.TokenizerWrapper(ByteTokens())
    return llguidance.LLTokenizer(wrapper, n_vocab=EOS + 1, eos_token=EOS, slices=[])


def answer(request: bytes) -> bytes:
    """Compile a grammar and take its first step."""
    matcher = llguidance.LLMatcher(_tokenizer(), request.decode(), log_level=0, limits=LIMITS)
    if not matcher.is_error():
        matcher.compute_bitmask()
    return b""
