"""Token ids as text for logprobs; called by the endpoints, completions.py and chat.py."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from flowprefill.request import PromptLogprob, Token
from flowprefill.server.engine_protocol import ServedTokenizer

LOWEST = -9999.0  # what JSON gets for a probability of 0, as in vLLM and OpenAI's API


def finite(logprob: float) -> float:
    """Return a log-probability that JSON can hold."""
    return max(logprob, LOWEST)


def token_label(tokenizer: ServedTokenizer, token_id: int) -> str:
    """Return one token alone as text; part of a character shows as the replacement sign."""
    return tokenizer.token_bytes(token_id).decode("utf-8", "replace")


def top_labels(
    tokenizer: ServedTokenizer, token: Token | PromptLogprob, top: int | None = None
) -> dict[str, float]:
    """Return text -> logprob of the alternatives and of the token itself.

    Of several tokens with the same text the most likely one counts.

    Args:
        top: alternatives to show; None: all that there are.
    """
    labels: dict[str, float] = {}
    for one in token.top_logprobs[:top]:
        labels.setdefault(token_label(tokenizer, one.token_id), finite(one.logprob))
    if token.logprob is not None:
        labels.setdefault(token_label(tokenizer, token.token_id), finite(token.logprob))
    return labels


def begun_chars(tokenizer: ServedTokenizer, token: Token) -> int:
    """Return how many characters begin in a token; a control token that is left out has none.

    Unlike the text released with it: that may wait for what could become a stop string.
    """
    if not token.text and tokenizer.is_special(token.token_id):
        return 0
    return _begun(tokenizer.token_bytes(token.token_id))


def _begun(spelled: bytes) -> int:
    return sum((byte & 0xC0) != 0x80 for byte in spelled)


def text_offsets(tokenizer: ServedTokenizer, ids: Sequence[int], text: str) -> list[int]:
    """Return where in a prompt's text each of its tokens begins, in characters.

    A token that the text has not, such as one that the tokenizer added, takes no room in it.
    """
    encoded = text.encode("utf-8", "replace")
    offsets, position, chars = [], 0, 0
    for token_id in ids:
        offsets.append(chars)
        spelled = tokenizer.token_bytes(token_id)
        if not encoded.startswith(spelled, position):
            # Without the space that some tokenizers put before a text's first word.
            spelled = spelled.removeprefix(b" ") if position == 0 else spelled
            if tokenizer.is_special(token_id):
                continue
        here = encoded[position : position + len(spelled)]
        position += len(here)
        chars += _begun(here)
    return offsets


def prompt_entries(
    tokenizer: ServedTokenizer, prompt: Iterable[PromptLogprob | None], top: int
) -> list[dict[str, Any] | None]:
    """Return a prompt's log-probabilities as vLLM shows them: token id -> what it is."""
    return [None if one is None else _entry(tokenizer, one, top) for one in prompt]


def _entry(tokenizer: ServedTokenizer, one: PromptLogprob, top: int) -> dict[str, Any]:
    ranked = [(one.token_id, one.logprob, one.rank)]
    ranked += [(t.token_id, t.logprob, i) for i, t in enumerate(one.top_logprobs[:top], 1)]
    entry: dict[str, Any] = {}
    for token_id, logprob, rank in ranked:
        label = token_label(tokenizer, token_id)
        shown = {"logprob": finite(logprob), "rank": rank, "decoded_token": label}
        entry.setdefault(str(token_id), shown)
    return entry


def chat_entry(tokenizer: ServedTokenizer, token_id: int, logprob: float | None) -> dict[str, Any]:
    """Return one token as chat logprobs show it; clients join the bytes of split characters."""
    return {
        "token": token_label(tokenizer, token_id),
        "logprob": logprob,
        "bytes": list(tokenizer.token_bytes(token_id)),
    }
