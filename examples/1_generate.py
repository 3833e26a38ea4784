"""Generate text in this process: submit requests, read tokens as they come.

You should see an answer appear word by word, then where its time went.
"""

from __future__ import annotations

from flowprefill import SLO, Engine, Request, SamplingParams


def main() -> None:
    """Ask one question of the packaged model."""
    with Engine("smollm2-135m") as engine:
        prompt = engine.render_chat([{"role": "user", "content": "What is the capital of France?"}])
        request = Request(
            prompt, SamplingParams(temperature=0, max_tokens=40), add_special_tokens=False
        )
        handle = engine.submit(request, slo=SLO(ttft=0.25, tpot=0.1))
        for token in handle:
            print(token.text, end="", flush=True)
        timings = handle.result().timings
        print(
            f"\nfirst token after {timings.ttft:.3f} s: waited {timings.queue:.3f} s, computed "
            f"{timings.prefill_run:.3f} s; objectives met: {timings.slo_met}"
        )


if __name__ == "__main__":
    main()
