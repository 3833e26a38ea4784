"""lm_eval on data made here: a generating task over chats, log-likelihoods over completions."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval
import pytest

QUESTIONS = [("One, two,", " three"), ("Red, green,", " blue"), ("Monday, Tuesday,", " Wednesday")]
COMMON = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
"""
GENERATE = (
    COMMON
    + """
task: own_generate
output_type: generate_until
generation_kwargs: {{until: ["\\n"], max_gen_toks: 8}}
metric_list: [{{metric: exact_match}}]
"""
)
LIKELIHOOD = (
    COMMON
    + """
task: own_likelihood
output_type: loglikelihood
metric_list: [{{metric: perplexity}}, {{metric: acc}}]
"""
)


@pytest.fixture
def task(tmp_path: Path) -> Callable[[str], Any]:
    data = tmp_path / "data.jsonl"
    lines = [json.dumps({"question": q, "answer": a}) + "\n" for q, a in QUESTIONS]
    data.write_text("".join(lines))

    def load(text: str) -> Any:
        file = tmp_path / "own.yaml"
        file.write_text(text.format(data=data))
        return lm_eval.tasks.TaskManager(include_path=str(tmp_path))

    return load


def test_generating_task(url: str, model: str, task: Callable[[str], Any]) -> None:
    results = lm_eval.simple_evaluate(
        model="local-chat-completions",
        model_args={
            "base_url": f"{url}/v1/chat/completions", "model": model, "num_concurrent": 2,
            "tokenizer_backend": None,
        },
        tasks=["own_generate"], task_manager=task(GENERATE), apply_chat_template=True,
    )  # fmt: skip
    samples = results["samples"]["own_generate"]
    assert len(samples) == len(QUESTIONS)
    assert all(sample["resps"][0][0] for sample in samples)


def test_log_likelihood(
    url: str,
    model: str,
    task: Callable[[str], Any],
    post: Callable[[str, dict[str, Any]], tuple[int, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    probe = {"prompt": "One two", "echo": True, "logprobs": 1, "max_tokens": 1}
    status, reply = post("/v1/completions", probe)
    if status == 400:
        pytest.skip(f"this server has no log-probabilities of prompts: {reply['error']['message']}")
    results = lm_eval.simple_evaluate(
        model="local-completions",
        model_args={
            "base_url": f"{url}/v1/completions", "model": model, "num_concurrent": 1,
            "tokenizer_backend": "huggingface", "tokenizer": os.environ["FLOWPREFILL_TOKENIZER"],
        },
        tasks=["own_likelihood"], task_manager=task(LIKELIHOOD),
    )  # fmt: skip
    found = results["results"]["own_likelihood"]
    assert 1.0 <= found["perplexity,none"] < 20.0  # counting and colours are easy
