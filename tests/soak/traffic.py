"""Random requests of every kind to a server, each checked when it has ended; for soak.py."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import aiohttp

VOCAB = 40_000
SHAPE = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "unit": {"enum": ["C", "F"]}},
    "required": ["city", "unit"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": SHAPE}}
SAY = [{"role": "user", "content": "What is the weather in Paris?"}]
ENDS = ("stop", "length", "tool_calls")
COMPLETIONS, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
# Sent as they are, each with the status it must get.
BAD: tuple[tuple[str, bytes, int], ...] = (
    (COMPLETIONS, b"{", 400),
    (COMPLETIONS, b'{"prompt": "x", "temperature": 9}', 400),
    (COMPLETIONS, b'{"prompt": [999999999]}', 400),
    (COMPLETIONS, b'{"prompt": "x", "guided_regex": "(?=a)b"}', 400),
    (CHAT, b'{"messages": [{"role": "stranger", "content": "x"}]}', 400),
    (CHAT, b'{"messages": [{"role": "user", "content": "x"}], "model": "another"}', 404),
    (CHAT, b'{"messages": []}', 400),
    (CHAT, b"\xff\xfe", 400),
    ("/v1/nothing", b"{}", 404),
)


@dataclass
class Tally:
    """What came of all requests; `wrong` says what must not have happened."""

    kinds: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def fault(self, kind: str, what: str) -> None:
        """Note what must not happen; only the first hundred are kept."""
        if len(self.wrong) < 100:
            self.wrong.append(f"{kind}: {what[:300]}")


class Traffic:
    """Sends one random request at a time for each caller of `one`."""

    def __init__(self, session: aiohttp.ClientSession, chance: random.Random, tally: Tally) -> None:
        self._session, self._chance, self._tally = session, chance, tally
        self._kinds = {
            self._completion: 20, self._chat: 15, self._stream: 20, self._leave: 15,
            self._bad_body: 10, self._tool: 6, self._shape: 8, self._long: 4, self._hurried: 8,
            self._response: 4,
        }  # fmt: skip

    async def one(self) -> None:
        """Send one request of a random kind and check what comes."""
        (kind,) = self._chance.choices([*self._kinds], [*self._kinds.values()])
        name = kind.__name__.removeprefix("_")
        self._tally.kinds[name] += 1
        try:
            outcome = await kind()
        except (aiohttp.ClientError, OSError) as error:
            self._tally.fault(name, f"{type(error).__name__}: {error}")
            outcome = "connection error"
        self._tally.outcomes[outcome] += 1

    # ---- kinds ---------------------------------------------------------------------------------

    async def _completion(self) -> str:
        body = {"prompt": self._prompt(), "n": self._chance.choice((1, 1, 3)), **self._sampling()}
        return await self._whole("completion", COMPLETIONS, body)

    async def _chat(self) -> str:
        return await self._whole("chat", CHAT, {"messages": SAY, **self._sampling()})

    async def _response(self) -> str:
        return await self._whole(
            "response", RESPONSES, {"input": "Hi", "max_output_tokens": 16, "store": False}
        )

    async def _long(self) -> str:
        prompt = self._prompt(self._chance.randrange(1000, 3500))
        return await self._whole("long", COMPLETIONS, {"prompt": prompt, "max_tokens": 4})

    async def _hurried(self) -> str:
        """Ask for what cannot be: dropped (504) or served late."""
        slo = {"ttft_ms": 1, "on_miss": self._chance.choice(("drop", "demote"))}
        body = {"prompt": self._prompt(300), "max_tokens": 4, "slo": slo}
        return await self._whole("hurried", COMPLETIONS, body)

    async def _bad_body(self) -> str:
        path, raw, expected = self._chance.choice(BAD)
        async with self._post(path, raw) as reply:
            error = (await reply.json())["error"]
            if reply.status not in (expected, 429) or not error["message"]:
                self._tally.fault("bad body", f"{raw!r} got {reply.status}: {error}")
            return f"HTTP {reply.status}"

    async def _tool(self) -> str:
        body = {"messages": SAY, "tools": [TOOL], "tool_choice": "required", "max_tokens": 200}
        return await self._whole("tool", CHAT, body)

    async def _shape(self) -> str:
        form = {"type": "json_schema", "json_schema": {"name": "city", "schema": SHAPE}}
        return await self._whole(
            "shape", CHAT, {"messages": SAY, "response_format": form, "max_tokens": 200}
        )

    async def _leave(self) -> str:
        """Disconnect at a random moment: before the reply, or in the middle of a stream."""
        body = {"prompt": self._prompt(), "max_tokens": 200, "stream": self._chance.random() < 0.7}
        patience_s = self._chance.choice((0.0, 0.01, 0.1, 1.0))
        try:
            async with asyncio.timeout(patience_s), self._post(COMPLETIONS, body) as reply:
                async for _ in reply.content:
                    pass
        except TimeoutError:
            return "left"
        return "was answered before it left"

    async def _stream(self) -> str:
        is_chat = self._chance.random() < 0.5
        asked: dict[str, Any] = {"messages": SAY} if is_chat else {"prompt": self._prompt()}
        body = {**asked, **self._sampling(), "stream": True}
        async with self._post(CHAT if is_chat else COMPLETIONS, body) as reply:
            if reply.status != 200:
                return self._refusal("stream", reply.status, await reply.json())
            lines = [line.strip() async for line in reply.content if line.startswith(b"data: ")]
        return self._ends_of(lines)

    # ---- checks --------------------------------------------------------------------------------

    def _ends_of(self, lines: list[bytes]) -> str:
        """Check that a stream has exactly one terminal event, and that it is the last."""
        is_marked = lines[-1:] == [b"data: [DONE]"]
        events = [json.loads(line[6:]) for line in lines if line != b"data: [DONE]"]
        ends = [
            choice["finish_reason"]
            for event in events
            for choice in event.get("choices", ())
            if choice["finish_reason"] is not None
        ]
        errors = [event["error"]["code"] for event in events if "error" in event]
        is_whole = is_marked and len(ends) == 1 and ends[0] in ENDS and not errors
        is_broken = not is_marked and not ends and len(errors) == 1 and "error" in events[-1]
        if not (is_whole or is_broken):
            self._tally.fault("stream", f"ends {ends}, errors {errors}, mark {is_marked}")
        return ends[0] if ends else str(errors)

    async def _whole(self, kind: str, path: str, body: dict[str, Any]) -> str:
        async with self._post(path, body) as reply:
            told = await reply.json()
            if reply.status != 200:
                return self._refusal(kind, reply.status, told)
        if path == RESPONSES:
            return f"response {told['status']}"
        ends = [choice["finish_reason"] for choice in told["choices"]]
        if len(ends) != body.get("n", 1) or not set(ends) <= {*ENDS}:
            self._tally.fault(kind, f"ends {ends}")
        if ends[0] == "stop" and kind == "shape":
            self._check_shape(kind, told["choices"][0]["message"]["content"])
        if ends[0] == "tool_calls":
            for call in told["choices"][0]["message"]["tool_calls"]:
                self._check_shape(kind, call["function"]["arguments"])
        return str(ends[0])

    def _check_shape(self, kind: str, text: str) -> None:
        try:
            found = json.loads(text)
        except ValueError:
            found = {}
        if set(found) != {"city", "unit"} or found["unit"] not in ("C", "F"):
            self._tally.fault(kind, f"not as the schema wants it: {text!r}")

    def _refusal(self, kind: str, status: int, told: Any) -> str:
        """Check a reply that is an error: only load and deadlines may refuse these requests."""
        code = told["error"]["code"]
        if (status, code) not in ((429, "overloaded"), (504, "deadline_passed")):
            self._tally.fault(kind, f"HTTP {status}: {told}")
        return f"HTTP {status}"

    # ---- parts ---------------------------------------------------------------------------------

    def _post(self, path: str, body: dict[str, Any] | bytes) -> Any:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self._session.post(path, data=raw, headers={"Content-Type": "application/json"})

    def _prompt(self, tokens: int = 0) -> list[int]:
        tokens = tokens or self._chance.choice((1, 8, 30, 100, 400))
        return [self._chance.randrange(100, VOCAB) for _ in range(tokens)]

    def _sampling(self) -> dict[str, Any]:
        return {
            "max_tokens": self._chance.randrange(1, 24),
            "temperature": self._chance.choice((0, 0.8)),
            "seed": self._chance.randrange(2**31),
            "slo": {"ttft_ms": self._chance.choice((200, 2000, 60_000))},
        }
