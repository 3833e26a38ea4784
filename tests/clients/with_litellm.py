"""litellm: its SDK straight to the server, and its proxy between OpenAI's client and the server."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import litellm
import openai
import pytest

START_S = 300.0
KEY = "sk-test"
MESSAGES = [{"role": "user", "content": "What is the weather in Paris?"}]


def ask(url: str, model: str, **more: Any) -> Any:
    return litellm.completion(
        model=f"hosted_vllm/{model}", api_base=f"{url}/v1", api_key="none", messages=MESSAGES,
        temperature=0, **more,
    )  # fmt: skip


def begins_right(text: str) -> bool:
    """It takes additionalProperties out of schemas, so a text may go on after what was asked."""
    return text.lstrip("{ \n").startswith('"city"')


def test_whole_and_streamed_agree(url: str, model: str) -> None:
    whole = ask(url, model, max_tokens=10)
    chunks = ask(url, model, max_tokens=10, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content != ""
    assert whole.usage.completion_tokens == 10


def test_openai_route(url: str, model: str) -> None:
    reply = litellm.completion(
        model=f"openai/{model}", api_base=f"{url}/v1", api_key="none", messages=MESSAGES,
        max_tokens=4,
    )  # fmt: skip
    assert reply.choices[0].message.content


def test_tools_and_schema(url: str, model: str, weather: dict[str, Any]) -> None:
    tools = [{"type": "function", "function": {"name": "weather", "parameters": weather}}]
    called = ask(url, model, tools=tools, tool_choice="required", max_tokens=200)
    (call,) = called.choices[0].message.tool_calls[:1]
    assert begins_right(call.function.arguments)
    schema = {"name": "weather", "schema": weather, "strict": True}
    format_ = {"type": "json_schema", "json_schema": schema}
    formed = ask(url, model, response_format=format_, max_tokens=200)
    assert begins_right(formed.choices[0].message.content)


def test_errors_have_their_classes(url: str, model: str) -> None:
    with pytest.raises(litellm.exceptions.BadRequestError, match="seed"):
        ask(url, model, seed="no number")
    with pytest.raises(litellm.exceptions.NotFoundError):
        ask(url, "another")


@pytest.fixture(scope="module")
def proxy(url: str, model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("proxy")
    settings = {"model": f"hosted_vllm/{model}", "api_base": f"{url}/v1", "api_key": "none"}
    config = {
        "model_list": [{"model_name": "ours", "litellm_params": settings}],
        "general_settings": {"master_key": KEY},
    }
    (folder / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            ["litellm", "--config", "config.yaml", "--host", "127.0.0.1", "--port", str(port)],
            cwd=folder, stdout=log, stderr=log,
            env={**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True"},
        )  # fmt: skip
        try:
            wait_until_ready(process, f"http://127.0.0.1:{port}", folder / "log")
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(30)


def wait_until_ready(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    deadline_s = time.monotonic() + START_S
    while True:
        assert process.poll() is None, log.read_text()[-2000:]
        try:
            urllib.request.urlopen(f"{address}/health/liveliness", timeout=5).close()
        except OSError:
            assert time.monotonic() < deadline_s, log.read_text()[-2000:]
            time.sleep(0.3)
        else:
            return


def test_proxy(proxy: str, weather: dict[str, Any]) -> None:
    client = openai.OpenAI(base_url=proxy, api_key=KEY, max_retries=0)
    messages: Any = MESSAGES
    whole = client.chat.completions.create(
        model="ours", messages=messages, max_tokens=10, temperature=0
    )
    chunks = client.chat.completions.create(
        model="ours", messages=messages, max_tokens=10, temperature=0, stream=True
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content != ""
    tools: Any = [{"type": "function", "function": {"name": "weather", "parameters": weather}}]
    called = client.chat.completions.create(
        model="ours", messages=messages, tools=tools, tool_choice="required", max_tokens=200
    )
    call: Any = (called.choices[0].message.tool_calls or [])[0]
    assert begins_right(call.function.arguments)
    assert client.completions.create(model="ours", prompt="One two", max_tokens=4).choices[0].text
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="ours", messages=messages, max_tokens=-1)
