"""The reasons of decisions are those that docs/api.md lists."""

from __future__ import annotations

import re
from pathlib import Path

from flowprefill.scheduling.reasons import Reason

API = Path(__file__).parents[3] / "docs" / "api.md"


def test_reasons_are_exactly_those_in_the_documentation() -> None:
    section = API.read_text(encoding="utf-8").split("### Reasons\n")[1].split("\n## ")[0]
    assert re.findall(r"^\| `(.+?)` \|", section, re.MULTILINE) == list(Reason)
