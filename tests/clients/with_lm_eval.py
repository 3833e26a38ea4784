"""lm_eval on data made here: a generating task over chats, log-likelihoods over completions."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval
import pytest

DATA = [
    {"question": "One, two,", "choices": ["three", "blue", "a long walk"], "label": 0},
    {"question": "Red, green,", "choices": ["Wednesday", "blue", "three"], "label": 1},
    {"question": "Monday, Tuesday,", "choices": ["three", "Wednesday", "red"], "label": 1},
]
COMMON = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
"""
GENERATE = (
    COMMON
    + """
task: own_generate
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[label]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 8}}
metric_list: [{{metric: exact_match}}]
"""
)
CHOICE = (
    COMMON
    + """
task: own_choice
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: label
metric_list: [{{metric: acc}}]
"""
)
ROLLING = (
    COMMON
    + """
task: own_rolling
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}} {{{{choices[label]}}}}"
metric_list: [{{metric: word_perplexity}}]
"""
)


@pytest.fixture
def task(tmp_path: Path) -> Callable[[str], Any]:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(one) + "\n" for one in DATA))

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
    assert len(samples) == len(DATA)
    assert all(sample["resps"][0][0] for sample in samples)


@pytest.mark.parametrize(
    ("name", "text", "metric"),
    [("own_choice", CHOICE, "acc,none"), ("own_rolling", ROLLING, "word_perplexity,none")],
)
def test_log_likelihoods_are_those_of_transformers(
    name: str,
    text: str,
    metric: str,
    url: str,
    model: str,
    task: Callable[[str], Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its two models on the same task: the server, and transformers on the same file in float32."""
    tokenizer = os.environ["FLOWPREFILL_TOKENIZER"]
    file = Path(os.environ["FLOWPREFILL_MODEL_FILE"])
    served = lm_eval.simple_evaluate(
        model="local-completions",
        model_args={
            "base_url": f"{url}/v1/completions", "model": model, "num_concurrent": 1,
            "tokenizer_backend": "huggingface", "tokenizer": tokenizer,
        },
        tasks=[name], task_manager=task(text),
    )  # fmt: skip
    reference = lm_eval.simple_evaluate(
        model="hf",
        model_args={
            "pretrained": str(file.parent), "gguf_file": file.name, "tokenizer": tokenizer,
            "dtype": "float32", "device": "cpu",
        },
        tasks=[name], task_manager=task(text),
    )  # fmt: skip
    scores, expected = (scores_of(one["samples"][name]) for one in (served, reference))
    assert len(expected) == len(DATA) * (len(DATA[0]["choices"]) if name == "own_choice" else 1)
    largest = max(abs(one[0] - two[0]) for one, two in zip(scores, expected, strict=True))
    with capsys.disabled():
        print(f"{name}: log-likelihoods differ by {largest:.1e} at most")
    assert largest < 1e-3
    assert [one[1:] for one in scores] == [one[1:] for one in expected]  # is it greedy
    found, wanted = (one["results"][name][metric] for one in (served, reference))
    assert found == pytest.approx(wanted, rel=1e-4)


def scores_of(samples: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """(log-likelihood, greedy) of each choice; the log-likelihood alone of a rolling task."""
    samples = sorted(samples, key=lambda sample: sample["doc_id"])
    replies = [reply[0] for sample in samples for reply in sample["resps"]]
    return [reply if isinstance(reply, tuple | list) else (reply,) for reply in replies]
