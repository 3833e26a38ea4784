"""A short urgent prompt stops a long one that is being prefilled, and the long one goes on.

You should see the short prompt answered within a fraction of a second although the long one takes
several, and the long one's count of preemptions.
"""

from __future__ import annotations

import random
import time

from flowprefill import SLO, Engine, EngineConfig, Request, SamplingParams

ONE_TOKEN = SamplingParams(temperature=0, max_tokens=1)


def main() -> None:
    """Submit a 6,000-token prompt, then three short ones while it runs."""
    config = EngineConfig(prefix_cache=False)
    words = random.Random(0)
    with Engine("smollm2-135m", config) as engine:
        long = engine.submit(
            Request([words.randrange(1000, 40000) for _ in range(6000)], ONE_TOKEN), SLO(ttft=60)
        )
        for _ in range(3):
            time.sleep(0.5)
            ids = [words.randrange(1000, 40000) for _ in range(64)]
            timings = engine.submit(Request(ids, ONE_TOKEN), SLO(ttft=0.5)).result().timings
            print(f"short: first token after {timings.ttft:.3f} s")
        timings = long.result().timings
        print(
            f"long: first token after {timings.ttft:.2f} s, {timings.preemptions} preemptions, "
            f"suspended for {timings.suspended:.3f} s"
        )


if __name__ == "__main__":
    main()
