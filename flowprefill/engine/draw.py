"""Positions in arrays of logits or weights: the k largest, the largest p of the total, one drawn.

Pure numpy, made for vocabularies of 100,000 tokens and more: nothing sorts or sums up all of them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]
Ids = NDArray[np.intp]

_CHUNK = 64  # values summed up or compared at a time, where all at once would be slow


def top_k_ids(values: Logits, k: int) -> Ids:
    """Return the positions of the k largest values, ascending; of equal ones the first.

    The k-th largest of the chunks' maxima is at most the k-th largest value (k chunks have a value
    that large), so where there are many more chunks than k, only a few values are left to look at.
    """
    candidates: Ids | None = None
    if values.size >= 4 * k * _CHUNK:
        maxima = np.maximum.reduceat(values, np.arange(0, values.size, _CHUNK))
        candidates = np.flatnonzero(values >= _kth_largest(maxima, k))
        values = values[candidates]
    return narrowed(candidates, _first_k(values, k, _kth_largest(values, k)))


def top_p_ids(weights: Logits, p: float) -> Ids:
    """Return the positions, ascending, of the fewest largest weights that add up to p of the total.

    Without sorting them all: weights are added up in buckets of nearly equal ones, and only the
    bucket in which the sum reaches p is sorted. Mostly a few large ones suffice.

    Args:
        weights: float32 [n], >= 0, the largest about 1.
        p: in (0, 1).
    """
    wanted = p * float(weights.sum(dtype=np.float64))
    candidates, found = None, weights
    for lowest in (1e-2, 1e-4):
        likely = np.flatnonzero(weights >= lowest)
        if weights[likely].sum(dtype=np.float64) >= wanted:
            candidates, found = likely, weights[likely]
            break
    # Non-negative floats are ordered as their bits are: exponent and 5 bits of the mantissa.
    buckets = found.view(np.int32) >> 18
    sums = np.bincount(buckets, weights=found)[::-1].cumsum()  # from the largest bucket down
    wanted = min(wanted, float(sums[-1]))
    index = int(sums.searchsorted(wanted))
    bucket = sums.size - 1 - index
    inside = np.sort(found[buckets == bucket])[::-1]
    reached = (sums[index - 1] if index else 0.0) + inside.cumsum(dtype=np.float64)
    needed = min(int(reached.searchsorted(wanted)) + 1, inside.size)
    above = int(np.count_nonzero(buckets > bucket))
    return narrowed(candidates, _first_k(found, above + needed, inside[needed - 1]))


def draw_position(weights: Logits, uniform: float) -> int:
    """Return the position at which the cumulative weights pass ``uniform`` of their total.

    In two levels, chunks then tokens, because a float64 cumulative sum over all is slow. A chunk's
    float32 sum is off by at most a few parts in a million, and so is a token's probability.

    Args:
        weights: float32 [n], >= 0, at least one > 0.
        uniform: in [0, 1).
    """
    starts = np.arange(0, weights.size, _CHUNK)
    chunks = np.add.reduceat(weights, starts).cumsum(dtype=np.float64)
    chunk = _passing(chunks, uniform * chunks[-1])
    before = chunks[chunk - 1] if chunk else 0.0
    start = chunk * _CHUNK
    inside = weights[start : start + _CHUNK].cumsum(dtype=np.float64)
    return start + _passing(inside, uniform * chunks[-1] - before)


def _passing(cumulative: NDArray[np.float64], target: float) -> int:
    """Return the first position above the target, or the last with weight if rounding left none."""
    position = int(cumulative.searchsorted(target, side="right"))
    if position < cumulative.size:
        return position
    return int(cumulative.searchsorted(cumulative[-1], side="left"))


def _kth_largest(values: Logits, k: int) -> np.float32:
    threshold: np.float32 = np.partition(values, values.size - k)[values.size - k]
    return threshold


def _first_k(values: Logits, k: int, threshold: np.float32) -> Ids:
    """Return the positions, ascending, of the k largest, the k-th largest being `threshold`."""
    kept = np.flatnonzero(values >= threshold)
    surplus = kept.size - k
    if surplus > 0:  # ties at the threshold: drop the last of them
        ties = np.flatnonzero(values[kept] == threshold)
        kept = np.delete(kept, ties[ties.size - surplus :])
    return kept


def narrowed(ids: Ids | None, kept: Ids) -> Ids:
    """Return those of the ids at the positions kept; None stands for all ids, 0 to n - 1."""
    return kept if ids is None else ids[kept]
