"""The OpenAI client against our server. Start it first: flowprefill serve --port 8000

You should see a streamed answer; the SLO travels in the request's body.
"""

from __future__ import annotations

from openai import OpenAI


def main() -> None:
    """Stream one chat answer with a TTFT objective of 250 ms."""
    client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
    stream = client.chat.completions.create(
        model="smollm2-135m",
        messages=[{"role": "user", "content": "Why is the sky blue?"}],
        max_completion_tokens=60,
        temperature=0,
        stream=True,
        extra_body={"slo": {"ttft_ms": 250, "tpot_ms": 100}},
    )
    for chunk in stream:
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main()
