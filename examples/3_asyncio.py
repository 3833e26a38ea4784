"""Many requests from asyncio, some of them cancelled.

You should see ten requests end, every third cancelled, and no KV block in use at the end.
"""

from __future__ import annotations

import asyncio

from flowprefill import SLO, Engine, Request, RequestCancelled, SamplingParams


async def ask(engine: Engine, number: int) -> str:
    """Submit one request; every third is cancelled at its first token."""
    prompt = f"Count from {number} to {number + 5}: {number},"
    sampling = SamplingParams(temperature=0, max_tokens=12)
    handle = engine.submit(Request(prompt, sampling), SLO(ttft=2.0))
    try:
        async for _ in handle:
            if number % 3 == 0:
                handle.cancel()
        return (await handle).text
    except RequestCancelled:
        return "(cancelled)"


async def main() -> None:
    """Run ten requests at once."""
    with Engine("smollm2-135m") as engine:
        answers = await asyncio.gather(*(ask(engine, number) for number in range(10)))
        for number, answer in enumerate(answers):
            print(f"{number}: {answer!r}")
        print("KV blocks in use:", engine.stats().kv_blocks_used)


if __name__ == "__main__":
    asyncio.run(main())
