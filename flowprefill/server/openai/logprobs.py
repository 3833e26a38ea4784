"""Token ids as text for logprobs; called by completions.py and chat.py."""

from __future__ import annotations

from typing import Any

from flowprefill.request import Token
from flowprefill.server.engine_protocol import ServedTokenizer


def token_label(tokenizer: ServedTokenizer, token_id: int) -> str:
    """Return one token alone as text; part of a character shows as the replacement sign."""
    return tokenizer.token_bytes(token_id).decode("utf-8", "replace")


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
    """Return one token as chat logprobs show it; clients join the bytes of split characters."""
    return {
        "token": token_label(tokenizer, token_id),
        "logprob": logprob,
        "bytes": list(tokenizer.token_bytes(token_id)),
    }
