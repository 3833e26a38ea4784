"""FLOWPREFILL_ISA limits what the CPU computes with; it is read once a process, so in children."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from flowprefill import _core

ASK = """
import json
from flowprefill.engine.cpu_device import resolve_dtype
from flowprefill.errors import ConfigError
from flowprefill import _core
try:
    print(json.dumps({"dtype": resolve_dtype("auto"), "isa": _core.isa()}))
    resolve_dtype("bf16")
except ConfigError as error:
    print(json.dumps({"error": error.message, "param": error.param}))
"""


def answers(isa: str) -> list[dict[str, Any]]:
    """What a process limited to `isa` says of itself."""
    child = subprocess.run(
        [sys.executable, "-c", ASK],
        env=os.environ | {"FLOWPREFILL_ISA": isa},
        capture_output=True,
        text=True,
        timeout=250,
        check=True,
    )
    return [json.loads(line) for line in child.stdout.splitlines()]


@pytest.mark.parametrize("isa", _core.available_isas())
def test_isa_of_the_processor_is_used_and_decides_the_element_type(isa: str) -> None:
    used, *refusal = answers(isa)
    multiplies_bf16 = isa in ("avx512_bf16", "amx")
    assert used == {"dtype": "bf16" if multiplies_bf16 else "f32", "isa": isa}
    assert [error["param"] for error in refusal] == ([] if multiplies_bf16 else ["dtype"])


@pytest.mark.parametrize("isa", ["sse9", "AVX2", "neon"])
def test_isa_unknown_is_refused_with_those_allowed(isa: str) -> None:
    (refusal,) = answers(isa)
    allowed = ", ".join(_core.available_isas())
    assert refusal == {
        "error": f"FLOWPREFILL_ISA: got '{isa}', expected one of {allowed} on this processor",
        "param": "FLOWPREFILL_ISA",
    }
