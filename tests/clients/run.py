"""`make test-clients`: one server of the embedded model, and each client's tests against it.

    python tests/clients/run.py openai litellm ...     names of the files with_NAME.py

Environments are build/clients/NAME, made by the Makefile from requirements/NAME.txt.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from flowprefill.bench.http_client import running_server
from flowprefill.bench.report import print_table
from flowprefill.models.registry import resolve_model

HERE = Path(__file__).resolve().parent
ENVIRONMENTS = HERE.parents[1] / "build/clients"
MODEL = "smollm2-135m"
SETTINGS: dict[str, Any] = {
    "dtype": "f32",  # so that log-probabilities are transformers' to the third digit
    "kv_cache_gib": 1.0,
    "prefix_cache": False,  # load tools send the same prompts in each round
    "server": {"reasoning_parser": "none"},
}


def run_client(name: str, url: str, tokenizer: Path) -> dict[str, Any]:
    """Run one client's tests; returns its row of the table."""
    python = ENVIRONMENTS / name / "bin/python"
    command = [
        str(python), "-m", "pytest", "-c", str(HERE / "pytest.ini"), "-p", "no:cacheprovider",
        "--basetemp", str(ENVIRONMENTS / name / "tmp"), str(HERE / f"with_{name}.py"),
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
        "FLOWPREFILL_URL": url,
        "FLOWPREFILL_TOKENIZER": str(tokenizer),
        "FLOWPREFILL_MODEL_FILE": str(resolve_model(MODEL).path),
        "PATH": f"{python.parent}:{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "OPENAI_API_KEY": "none",
    }
    sys.stdout.write(f"=== {name}\n")
    sys.stdout.flush()
    start_s = time.monotonic()
    result = subprocess.run(command, env=environment, cwd=ENVIRONMENTS / name, check=False)
    return {
        "client": name,
        "result": "passed" if result.returncode == 0 else "FAILED",
        "seconds": round(time.monotonic() - start_s, 1),
    }


def save_tokenizer(folder: Path) -> None:
    """Write the model's tokenizer as transformers reads it: load tools count tokens themselves."""
    from transformers import AutoTokenizer

    file = resolve_model(MODEL).path
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    tokenizer.save_pretrained(str(folder))


def main(names: list[str]) -> int:
    """Run the clients in turn; returns 1 if one failed."""
    tokenizer = ENVIRONMENTS / "tokenizer"
    if not (tokenizer / "tokenizer.json").exists():
        save_tokenizer(tokenizer)
    with running_server(MODEL, SETTINGS) as url:
        rows = [run_client(name, url, tokenizer) for name in names]
    print_table("Clients", rows, {"client": "client", "result": "result", "seconds": "seconds"})
    return int(any(row["result"] != "passed" for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
