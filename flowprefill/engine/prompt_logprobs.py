"""PromptLogprobs: what a model says of a prompt's tokens; made by the engine of a device's scores.

An 8k prompt with 20 alternatives each has 160,000 of them: they stay arrays, and objects are made
of those that are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from flowprefill.errors import RequestFailed
from flowprefill.request import PromptLogprob, TokenLogprob

_TOP = 20
# One row as csrc/graph/prompt_score.h has it.
SCORE = np.dtype(
    [
        ("log_sum_exp", np.float32),
        ("target_logit", np.float32),
        ("rank", np.int32),
        ("top_ids", np.int32, _TOP),
        ("top_logits", np.float32, _TOP),
    ]
)


class PromptLogprobs(Sequence[PromptLogprob | None]):
    """One entry for each prompt token; None for the first, which nothing precedes.

    Attributes:
        token_ids: int32 [tokens], the prompt.
        logprobs: float32 [tokens], NaN for the first.
        ranks: int32 [tokens], 0 for the first.
        top_ids: int32 [tokens, k], the most likely tokens in each place, best first; -1 for the
            first, and where the vocabulary has fewer than k.
        top_logprobs: float32 [tokens, k] of those.

    Thread: any; constant.
    """

    def __init__(self, token_ids: Sequence[int], scores: NDArray[Any], top: int) -> None:
        """Copy what is needed of the scores.

        Args:
            token_ids: the prompt.
            scores: SCORE [tokens], of each row; the last, which has no token after it, counts not.
            top: alternatives to keep.

        Raises:
            RequestFailed: a logit was not finite.
        """
        before = scores[:-1]
        self.token_ids = np.array(token_ids, dtype=np.int32)
        self.logprobs = _after_first(before["target_logit"] - before["log_sum_exp"], np.nan)
        self.ranks = _after_first(before["rank"], 0)
        self.top_ids = _after_first(before["top_ids"][:, :top], -1)
        top_logprobs = before["top_logits"][:, :top] - before["log_sum_exp"][:, None]
        self.top_logprobs = _after_first(top_logprobs, np.nan)
        bad = np.flatnonzero(np.isnan(self.logprobs[1:]) | (self.logprobs[1:] == np.inf))
        if bad.size:
            raise RequestFailed(
                f"scoring prompt token {bad[0] + 1}: NaN or infinity among the logits"
            )

    def __len__(self) -> int:
        return len(self.token_ids)

    @overload
    def __getitem__(self, index: int) -> PromptLogprob | None: ...
    @overload
    def __getitem__(self, index: slice) -> list[PromptLogprob | None]: ...
    def __getitem__(self, index: int | slice) -> PromptLogprob | list[PromptLogprob | None] | None:
        """Return one token's entry, or a list of them."""
        if isinstance(index, slice):
            return [self._at(i) for i in range(*index.indices(len(self)))]
        return self._at(range(len(self))[index])

    def __iter__(self) -> Iterator[PromptLogprob | None]:
        return map(self._at, range(len(self)))

    def _at(self, index: int) -> PromptLogprob | None:
        if index == 0:
            return None
        top = zip(self.top_ids[index].tolist(), self.top_logprobs[index].tolist(), strict=True)
        return PromptLogprob(
            int(self.token_ids[index]),
            float(self.logprobs[index]),
            int(self.ranks[index]),
            tuple(TokenLogprob(token, logprob) for token, logprob in top if token >= 0),
        )


def _after_first(values: NDArray[Any], first: float) -> NDArray[Any]:
    return np.concatenate([np.full((1, *values.shape[1:]), first, values.dtype), values])
