"""Token ids as text for logprobs; called by completions.py and chat.py."""

from __future__ import annotations

from typing import Any

from flowprefill.request import Token
from flowprefill.server.engine_protocol import ServedTokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def token_label(tokenizer: ServedTokenizer, token_id: int) -> str:
    """Return the text of one token alone; part of a character shows as the replacement sign."""
    return tokenizer.decode([token_id])


def top_labels(tokenizer: ServedTokenizer, token: Token) -> dict[str, float]:
    """Return text -> logprob of the alternatives and of the token itself.

    Of several tokens with the same text the most likely one counts.
    """
    labels: dict[str, float] = {}
    for top in token.top_logprobs:
        labels.setdefault(token_label(tokenizer, top.token_id), top.logprob)
    if token.logprob is not None:
        labels.setdefault(token_label(tokenizer, token.token_id), token.logprob)
    return labels


def chat_entry(tokenizer: ServedTokenizer, token_id: int, logprob: float | None) -> dict[str, Any]:
    """Return one token as chat logprobs show it; bytes are null for part of a character."""
    text = token_label(tokenizer, token_id)
    is_whole = REPLACEMENT not in text
    return {
        "token": text,
        "logprob": logprob,
        "bytes": list(text.encode("utf-8")) if is_whole else None,
    }
