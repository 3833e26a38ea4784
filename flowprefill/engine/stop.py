"""StopChecker: decides after each token which text may be released and whether generation ends.

One per request, called by the engine's event thread; pure, no locks. For each sampled token the
engine asks `reason_of(token_id)` first: a stop token never reaches the text decoder, and a token
that ends generation makes the decoder flush. Then it hands the decoded piece to `push`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flowprefill.request import FinishReason, SamplingParams


@dataclass(frozen=True, slots=True)
class ReleasedText:
    """What follows from one token.

    Attributes:
        text: text that may be shown now; no later token can take it back.
        finish_reason: ``stop`` or ``length`` when this was the last token.
    """

    text: str
    finish_reason: FinishReason | None


class _StopString:
    """Finds one stop string in text fed character by character (Knuth, Morris, Pratt).

    Attributes:
        matched: the longest prefix of the string that the text fed so far ends with.
    """

    __slots__ = ("_fallback", "matched", "pattern")

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.matched = 0
        # _fallback[n - 1]: longest proper prefix that the first n characters end with. Extended
        # only as far as matches get, so that a huge stop string costs nothing up front.
        self._fallback = [0]

    def feed(self, char: str) -> bool:
        """Advance by one character; True when the string is complete, which it then stays."""
        pattern, matched = self.pattern, self.matched
        if matched == len(pattern):  # an occurrence that did not count: look for the next
            matched = self._fallback[matched - 1]
        while matched and pattern[matched] != char:
            matched = self._fallback[matched - 1]
        if pattern[matched] == char:
            matched += 1
            if matched > len(self._fallback):
                self._extend_fallback()
        self.matched = matched
        return matched == len(pattern)

    @property
    def pending(self) -> int:
        """How many characters at the end of the text may still grow into an occurrence."""
        if self.matched == len(self.pattern):
            return self._fallback[-1]
        return self.matched

    def _extend_fallback(self) -> None:
        pattern, fallback = self.pattern, self._fallback
        char, length = pattern[len(fallback)], fallback[-1]
        while length and pattern[length] != char:
            length = fallback[length - 1]
        fallback.append(length + 1 if pattern[length] == char else 0)


class StopChecker:
    """Applies stop strings, stop token ids, end of sequence and the token limits of one request.

    The stop string that is *completed first* ends the text; of several completed by the same
    character the longest, that is the one that starts first. The text before it is the output, the
    string itself only with ``include_stop_str_in_output``. How the text is cut into pieces makes no
    difference. Text that may be the start of a stop string is held back, at most the length of the
    longest stop string less one; it is released once it cannot be, or at the end.

    Nothing ends generation before ``min_tokens`` tokens but the limit: an occurrence completed
    before the text of token number ``min_tokens`` is ordinary text.

    Cost: O(new characters x stop strings) per token, amortised.
    """

    def __init__(
        self,
        params: SamplingParams,
        eos_token_ids: Iterable[int] = (),
        max_tokens: int | None = None,
    ) -> None:
        """Make the checker of one request.

        Args:
            params: what the user asked for.
            eos_token_ids: the model's end-of-sequence tokens.
            max_tokens: most tokens the engine has room for, >= 1; the smaller of this and
                ``params.max_tokens`` counts. None: only the latter.
        """
        self._eos_ids = frozenset(eos_token_ids)
        self._stop_ids = stop_token_ids(params, self._eos_ids)
        limits = [n for n in (params.max_tokens, max_tokens) if n is not None]
        self._max_tokens = min(limits) if limits else None
        self._min_tokens = params.min_tokens
        self._includes_stop = params.include_stop_str_in_output
        self._strings = [_StopString(pattern) for pattern in dict.fromkeys(params.stop)]
        self._held = ""
        self._count = 0
        self._is_finished = False

    def reason_of(self, token_id: int, *, is_last: bool = False) -> FinishReason | None:
        """Say whether the next token ends generation, whatever its text; changes nothing.

        Args:
            is_last: its structured output is complete with it.

        Returns:
            ``stop`` for an end-of-sequence or stop token: give `push` the decoder's flush without
            this token. ``length`` for the last token allowed: give it this token's text and the
            flush. None otherwise: the text may still complete a stop string.
        """
        if is_last and token_id in self._eos_ids:  # no text of its structure, also where ignored
            return "stop"
        count = self._count + 1
        if token_id in self._stop_ids and count >= self._min_tokens:
            return "stop"
        if self._max_tokens is not None and count >= self._max_tokens:
            return "length"
        return None

    def may_end_with(self, token_id: int) -> bool:
        """Whether the next token may end generation: False only if no text of it would."""
        return bool(self._strings) or self.reason_of(token_id) is not None

    def push(self, token_id: int, piece: str, *, is_last: bool = False) -> ReleasedText:
        """Take the next token and the text that became final with it.

        Args:
            is_last: nothing may follow it: its structured output is complete.

        Raises:
            AssertionError: generation has ended already (a bug of ours).
        """
        assert not self._is_finished, "a token after the last one"
        reason = "stop" if is_last else self.reason_of(token_id)
        self._count += 1
        cut = self._find_stop(piece) if self._strings else None
        if cut is not None:
            self._is_finished = True
            return ReleasedText(cut, "stop")
        text = self._held + piece
        if reason is not None:
            self._is_finished = True
            self._held = ""
            return ReleasedText(text, reason)
        keep = self._hold_back()
        split = len(text) - keep
        self._held = text[split:]
        return ReleasedText(text[:split], None)

    def flush(self) -> str:
        """Return the text held back, for a request that ends early (cancelled, expired, failed)."""
        held, self._held = self._held, ""
        self._is_finished = True
        return held

    def _find_stop(self, piece: str) -> str | None:
        """Advance all stop strings over the piece; return the text to release if one ends here."""
        counts = self._count >= self._min_tokens
        for position, char in enumerate(piece, start=1):
            longest = 0
            for string in self._strings:
                if string.feed(char):
                    longest = max(longest, len(string.pattern))
            if longest and counts:
                text = self._held + piece[:position]
                return text if self._includes_stop else text[: len(text) - longest]
        return None

    def _hold_back(self) -> int:
        """Return how many characters at the end of the text may yet be part of a stop string."""
        if self._includes_stop:
            return 0  # what a stop string starts with is released in any case
        return max((string.pending for string in self._strings), default=0)


def stop_token_ids(params: SamplingParams, eos_token_ids: Iterable[int]) -> frozenset[int]:
    """Return the tokens that end this request; the sampler masks them before min_tokens."""
    eos = () if params.ignore_eos else eos_token_ids
    return frozenset(params.stop_token_ids).union(eos)
