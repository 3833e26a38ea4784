"""`flowprefill serve` as users start it: a process, a real model, clients, and what it counts.

Each POST asks for its timings, so that what /metrics sums can be added up from the replies.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
from fake_engine import WAIT_S

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {
    "calibrate": False, "kv_cache_gib": 0.5, "max_waiting": 40,
    "classes": {"chat": {"ttft_ms": 600_000}, "lost": {"ttft_ms": 0.001, "on_miss": "drop"}},
    "server": {"shutdown_grace_s": WAIT_S},
}  # fmt: skip
SHAPE = {
    "type": "object",
    "properties": {"unit": {"enum": ["C", "F"]}},
    "required": ["unit"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": SHAPE}}


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Yield the process and its address; it has ended when the test has."""
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps(SETTINGS))
    command = [sys.executable, "-m", "flowprefill", "serve", "smollm2-135m", "--port", "0"]
    process = subprocess.Popen(
        [*command, "--config", str(settings)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=dict(os.environ),
    )  # fmt: skip
    assert process.stdout is not None
    said = ""
    with process, contextlib.ExitStack() as stack:
        stack.callback(process.kill)
        for line in process.stdout:
            said += line
            if found := re.search(r"serving .* at (http://\S+)", line):
                break
        else:
            pytest.fail(said)
        reader = threading.Thread(target=process.stdout.read)  # it must not wait for a reader
        reader.start()
        yield process, found[1]
        process.kill()
        reader.join(WAIT_S)


@dataclass
class Seen:
    """What clients saw of all requests; a choice is a request."""

    url: str
    session: aiohttp.ClientSession
    ends: Counter[str] = field(default_factory=Counter)
    sums: Counter[str] = field(default_factory=Counter)

    def note(
        self, reply: dict[str, Any], *reasons: str, output: int, times_prompt: int = 1
    ) -> None:
        """Note a reply, given why its choices ended."""
        usage, times = reply["usage"], reply.get("choice_metrics") or [reply["metrics"]]
        assert len(times) == len(reasons)
        self.ends.update("stop" if one == "tool_calls" else one for one in reasons)
        prompt = usage.get("prompt_tokens") or usage["input_tokens"]
        details = usage.get("prompt_tokens_details") or usage["input_tokens_details"]
        self.sums.update(
            prompt=prompt * times_prompt, output=output, cached=details["cached_tokens"]
        )
        self.sums["gaps"] += max(output - len(times), 0)
        for one in times:
            self.sums["preemptions"] += one["preemptions"]
            self.sums["objectives"] += one["slo_met"] is not None
            self.sums["met"] += one["slo_met"] is True
            for name in ("queue_time", "time_to_first_token", "suspended", "prefill_run"):
                self.sums[name] += one[f"{name}_ms"] / 1000

    async def post(self, path: str, **body: Any) -> tuple[int, dict[str, Any]]:
        body = {"return_metrics": True, **body}
        async with self.session.post(self.url + path, json=body) as reply:
            return reply.status, await reply.json()

    async def complete(self, prompt: Any, **more: Any) -> int:
        """Ask for a completion of one choice; returns the status."""
        status, reply = await self.post("/v1/completions", prompt=prompt, **more)
        if status == 200:
            output = reply["usage"]["completion_tokens"]
            self.note(reply, reply["choices"][0]["finish_reason"], output=output)
        else:
            self.ends[reply["error"]["code"]] += 1
        return status

    async def leave(self, events: int, **body: Any) -> None:
        """Ask for a stream and go after so many of its events."""
        async with self.session.post(f"{self.url}/v1/completions", json=body) as reply:
            while events:
                line = await reply.content.readline()
                events -= line.startswith(b"data: ")
            reply.close()
        self.ends["cancelled"] += 1

    async def metrics(self) -> dict[str, float]:
        """Return each metric's sum over its labels, and `requests_total` also by how they ended."""
        async with self.session.get(f"{self.url}/metrics") as reply:
            text = await reply.text()
        found: Counter[str] = Counter()
        for name, labels, value in re.findall(
            r"^flowprefill:(\w+)(\{.*\})? (\S+)$", text, re.MULTILINE
        ):
            found[name] += float(value)
            for label in re.findall(r'(?:finished_reason|reason|met)="(\w+)"', labels):
                found[f"{name} {label}"] += float(value)
        return found

    async def metrics_at_rest(self) -> dict[str, float]:
        """Return them once nothing runs: a client that left learns nothing of its request's end."""
        async with asyncio.timeout(WAIT_S):
            while True:
                found = await self.metrics()
                if found["requests_total cancelled"] == self.ends["cancelled"]:
                    return found
                await asyncio.sleep(0.05)


@contextlib.asynccontextmanager
async def clients_of(url: str) -> AsyncIterator[tuple[Seen, openai.AsyncOpenAI]]:
    limit = aiohttp.TCPConnector(limit=0)
    async with (
        aiohttp.ClientSession(connector=limit) as session,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield Seen(url, session), client


async def ask_of_every_kind(seen: Seen, client: openai.AsyncOpenAI) -> None:
    model: Any = {"model": "smollm2-135m", "extra_body": {"return_metrics": True}}
    say: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
    two = await client.completions.create(
        prompt="The capital of France is", max_tokens=6, n=2, seed=1, logprobs=2, **model
    )
    reasons = [str(choice.finish_reason) for choice in two.choices]
    assert two.usage is not None
    seen.note(two.model_dump(), *reasons, output=two.usage.completion_tokens, times_prompt=2)
    stopped = {"temperature": 0, "max_tokens": 40, "stop": [" six"]}
    assert await seen.complete("One, two, three,", **stopped) == 200
    assert seen.ends["stop"] >= 1
    schema = {"type": "json_schema", "json_schema": {"name": "unit", "schema": SHAPE}}
    called: Any = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}
    for more in ({}, {"response_format": schema}, called):
        whole = await client.chat.completions.create(messages=say, max_tokens=30, **more, **model)
        assert whole.usage is not None
        reason = whole.choices[0].finish_reason
        seen.note(whole.model_dump(), reason, output=whole.usage.completion_tokens)
        usage: Any = {"stream": True, "stream_options": {"include_usage": True}}
        stream: Any = await client.chat.completions.create(
            messages=say, max_tokens=30, **usage, **more, **model
        )
        events = [event.model_dump() async for event in stream]
        (reason,) = filter(None, (c["finish_reason"] for e in events for c in e["choices"]))
        seen.note(events[-1], reason, output=events[-1]["usage"]["completion_tokens"])
    vectors = await client.embeddings.create(input=["One.", "Two."], **model)
    seen.note(vectors.model_dump(), "stop", "stop", output=0)
    assert await seen.complete("One, two", max_tokens=0, echo=True, logprobs=1) == 200
    answer = await client.responses.create(input="Hi", max_output_tokens=4, **model)
    assert answer.usage is not None
    reason = "length" if answer.status == "incomplete" else "stop"
    seen.note(answer.model_dump(), reason, output=answer.usage.output_tokens)


async def ask_long_and_short(seen: Seen) -> None:
    """Ask for long prompts, without an objective, and many short ones with one."""
    chance = random.Random(1)
    prompts = [[chance.randrange(100, 40_000) for _ in range(3000)] for _ in range(2)]
    long = [asyncio.create_task(seen.complete(ids, max_tokens=2)) for ids in prompts]
    for number in range(10):
        short = f"The number {number} is"
        assert await seen.complete(short, max_tokens=3, slo={"class": "chat"}) == 200
    assert await asyncio.gather(*long) == [200, 200]
    assert await seen.complete(prompts[0][:500], max_tokens=2) == 200  # its beginning is cached


def check(found: dict[str, float], seen: Seen) -> None:
    """Compare the server's metrics with what the clients saw; no client has left."""
    sums, count = seen.sums, seen.ends["stop"] + seen.ends["length"]
    for reason in ("stop", "length"):
        assert found[f"requests_total {reason}"] == seen.ends[reason]
    assert found["requests_total"] == found["time_to_first_token_seconds_count"] == count
    assert found["prompt_tokens_total"] == sums["prompt"]
    assert found["generation_tokens_total"] == sums["output"]
    assert found["inter_token_latency_seconds_count"] == sums["gaps"]
    assert found["prefix_cache_hits_total"] == sums["cached"] > 0
    assert found["request_preemptions_sum"] == sums["preemptions"]
    assert found["preempt_ack_seconds_count"] == found["preemptions_total"]
    assert found["slo_requests_total"] == sums["objectives"] == 10
    assert found["slo_requests_total true"] == found["goodput_requests_total"] == sums["met"]
    for metric, key in (
        ("request_queue_time", "queue_time"),
        ("time_to_first_token", "time_to_first_token"),
        ("request_suspended", "suspended"),
        ("request_prefill_time", "prefill_run"),
    ):
        assert found[f"{metric}_seconds_count"] == count
        assert found[f"{metric}_seconds_sum"] == pytest.approx(sums[key], abs=1e-6 * count)


async def test_metrics_say_what_clients_saw(served: tuple[subprocess.Popen[str], str]) -> None:
    process, url = served
    async with clients_of(url) as (seen, client):
        await ask_of_every_kind(seen, client)
        await ask_long_and_short(seen)
        check(await seen.metrics(), seen)
        many = [seen.complete(f"{number} and", max_tokens=2) for number in range(200)]
        statuses = Counter(await asyncio.gather(*many))
        assert statuses[200] >= 40
        assert set(statuses) <= {200, 429}
        assert await seen.complete("Hi", slo={"class": "lost"}) == 504
        assert await seen.complete("one two " * 5000) == 400
        endless: dict[str, Any] = {"max_tokens": 500, "ignore_eos": True, "stream": True}
        await asyncio.gather(*(seen.leave(3, prompt="Once", **endless) for _ in range(5)))
        found = await seen.metrics_at_rest()
        assert found["requests_shed_total overloaded"] == seen.ends["overloaded"] == statuses[429]
        assert found["requests_shed_total deadline_passed"] == seen.ends["deadline_passed"] == 1
        assert found["cancel_to_free_seconds_count"] == seen.ends["cancelled"] == 5
        ended = sum(seen.ends[one] for one in ("stop", "length", "cancelled"))
        assert found["requests_total"] == ended + found["requests_total expired"]
        assert found["time_to_first_token_seconds_count"] == ended
        for gauge in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
            assert found[gauge] == 0
        await check_drain(process, seen)


async def check_drain(process: subprocess.Popen[str], seen: Seen) -> None:
    """Stop the server while streams are open: they are told to their ends, new ones refused."""
    body = {"prompt": "Once", "max_tokens": 60, "ignore_eos": True, "stream": True}
    async with contextlib.AsyncExitStack() as stack:
        streams = [
            await stack.enter_async_context(
                seen.session.post(f"{seen.url}/v1/completions", json=body)
            )
            for _ in range(4)
        ]
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(aiohttp.ClientConnectionError):  # it may have ended already
            async with asyncio.timeout(WAIT_S):
                while (await seen.post("/v1/completions", prompt="Hi", max_tokens=1))[0] != 503:
                    pass
        for stream in streams:
            told = (await stream.read()).decode()
            assert told.endswith("data: [DONE]\n\n")
            assert '"finish_reason":"length"' in told
    assert await asyncio.to_thread(process.wait, WAIT_S) == 0
