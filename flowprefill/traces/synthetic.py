"""A seeded trace with the statistics of two minutes of a chat service, for those without a file.

Class shares and the distributions of lengths are those of the first two minutes of Qwen-Bailian
trace A after its single-turn step (327 requests, 2.75 per second; Apache-2.0); arrivals are a
Poisson process, as its gaps nearly are (coefficient of variation 1.04). Pure.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Sequence

from flowprefill.errors import ConfigError
from flowprefill.traces.trace import Trace, TraceRequest

RATE_RPS = 2.746
REQUESTS = 327

# Quantiles of prompt and output tokens at these shares, and how many requests of each class.
SHARES = (0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 1)
CLASSES = {"text": 226, "image": 24, "search": 66, "file": 11}
PROMPT_TOKENS = {
    "text": (16, 69, 72, 92, 193, 354, 744, 756, 823, 918, 1118, 1404, 2506, 4613),
    "image": (350, 350, 351, 353, 356, 360, 372, 376, 384, 389, 394, 400, 686, 929),
    "search": (241, 1208, 2152, 2973, 3238, 3848, 4378, 5380, 5867, 6870, 8066, 10819, 14187,
               16744),
    "file": (111, 293, 475, 735, 851, 2699, 3210, 4172, 6359, 7003, 9116, 9918, 10399, 10720),
}  # fmt: skip
OUTPUT_TOKENS = {
    "text": (5, 32, 75, 107, 148, 222, 278, 354, 412, 510, 700, 907, 1204, 2381),
    "image": (47, 47, 49, 52, 54, 56, 70, 75, 83, 90, 178, 200, 206, 212),
    "search": (128, 148, 206, 241, 266, 291, 350, 374, 408, 540, 659, 960, 1275, 1488),
    "file": (288, 329, 370, 415, 690, 701, 707, 821, 919, 978, 2349, 2414, 2454, 2480),
}


def synthetic_trace(seed: int, requests: int = REQUESTS, rate_rps: float = RATE_RPS) -> Trace:
    """Make a trace of four classes (text, image, search, file) without objectives.

    Args:
        seed: equal seeds give equal traces.
        requests: how many, >= 1.
        rate_rps: mean arrivals per second, > 0.
    """
    if requests < 1 or not rate_rps > 0:
        raise ConfigError(f"requests {requests}, rate_rps {rate_rps}: expected >= 1 and > 0")
    rng = random.Random(seed)
    names, weights = list(CLASSES), list(CLASSES.values())
    made, at_s = [], 0.0
    for _ in range(requests):
        name = rng.choices(names, weights)[0]
        prompt, output = _drawn(rng, PROMPT_TOKENS[name]), _drawn(rng, OUTPUT_TOKENS[name])
        made.append(TraceRequest(at_s, prompt, output, name))
        at_s += rng.expovariate(rate_rps)
    return Trace(f"synthetic, seed {seed}", tuple(made))


def _drawn(rng: random.Random, quantiles: Sequence[int]) -> int:
    """Return a random length of a distribution given by its quantiles, straight between them."""
    share = rng.random()
    above = min(bisect_right(SHARES, share), len(SHARES) - 1)
    low, high = SHARES[above - 1], SHARES[above]
    part = (share - low) / (high - low)
    return round(quantiles[above - 1] + part * (quantiles[above] - quantiles[above - 1]))
