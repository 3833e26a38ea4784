"""Setting: one configuration of the scheduler that `bench goodput` compares, and the baselines."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from flowprefill.config import POLICIES, EngineConfig, Granularity
from flowprefill.errors import ConfigError

FORM = "POLICY+GRANULARITY or POLICY+GRANULARITY+batch:TOKENS"
_SETTING = re.compile(r"(\w+)\+([\w:.]+?)(?:\+batch:(\d{1,7}))?")
CHUNK_STEP = 16  # scaled chunks and batches are multiples of it


@dataclass(frozen=True, slots=True)
class Setting:
    """How requests are scheduled and prefills are cut.

    Attributes:
        policy: one of `POLICIES`.
        granularity: as the setting of that name.
        batch_tokens: most prompt tokens packed in one prefill; 0 is the engine's default.
    """

    policy: str
    granularity: str
    batch_tokens: int = 0

    @classmethod
    def parse(cls, text: str) -> Setting:
        """Parse ``slack_edf+budget:2`` or ``fcfs+chunk:2048+batch:2048``; ConfigError if bad."""
        match = _SETTING.fullmatch(text)
        if match is None:
            raise ConfigError(f"setting: got {text!r}, expected {FORM}", param="setting")
        if match[1] not in POLICIES:
            known = ", ".join(POLICIES)
            raise ConfigError(f"setting: policy {match[1]!r}, expected one of {known}")
        Granularity.parse(match[2])
        one = cls(match[1], match[2], int(match[3] or 0))
        EngineConfig(max_batch_tokens=one.most_batch_tokens)
        return one

    @property
    def most_batch_tokens(self) -> int:
        """Most prompt tokens packed in one prefill."""
        return self.batch_tokens or EngineConfig().max_batch_tokens

    def __str__(self) -> str:
        batch = f"+batch:{self.batch_tokens}" if self.batch_tokens else ""
        return f"{self.policy}+{self.granularity}{batch}"

    def scaled(self, length_scale: float) -> Setting:
        """Scale chunk and batch as the prompts are scaled, so that they cut as many pieces."""
        granularity = Granularity.parse(self.granularity)
        text = self.granularity
        if granularity.kind == "chunk":
            text = f"chunk:{_scaled(granularity.chunk_tokens, length_scale)}"
        batch = _scaled(self.batch_tokens, length_scale) if self.batch_tokens else 0
        return Setting(self.policy, text, batch)


def _scaled(tokens: int, length_scale: float) -> int:
    return max(CHUNK_STEP, round(tokens * length_scale / CHUNK_STEP) * CHUNK_STEP)


OURS = "slack_edf+budget:2"
FIRST_COME = "fcfs+none"  # what ratios are taken to
# What each stands for: docs/goodput.md.
BASELINES = (
    FIRST_COME,
    "fcfs+chunk:2048+batch:2048",
    "fcfs+chunk:8192+batch:8192",
    "edf+chunk:512",
    "edf+chunk:2048+batch:2048",
    "slack_edf+chunk:512",
    "s_edf_paper+layer",
    "s_edf_paper+operator",
    "s_edf_paper+operator+batch:2048",
    OURS,
)
# A real engine takes minutes for each: the first, the best chunked ones, the published rule, ours.
FEW = (
    FIRST_COME,
    "slack_edf+chunk:512",
    "fcfs+chunk:2048+batch:2048",
    "s_edf_paper+operator",
    OURS,
)


def parse_all(texts: Sequence[str]) -> list[Setting]:
    """Parse settings, each once, in order."""
    return list(dict.fromkeys(Setting.parse(text) for text in texts))
