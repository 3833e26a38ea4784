"""`bench gpu --shape --peer transformers`: prefill and decode by transformers, in turns with ours.

The same shape on the same card, in a process of its own (gpu_peer_child.py): whatever happens
there, its end by a time limit included, is a row of the report and no more.
"""

from __future__ import annotations

import json
import select
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from flowprefill.bench.gpu_model import GpuModel
from flowprefill.bench.report import Row
from flowprefill.bench.statistics import median

CHILD = "flowprefill.bench.gpu_peer_child"
COMPILED = ", torch.compile"  # behind the name of an implementation of attention
SHORTEST = 512  # tokens of a prompt
COMPILED_TOKENS = (2048, 8192)
COMPILED_S, EAGER_S = 20.0, 3.0  # a work is not begun with less time left
ROUNDS = 3
STEPS = 20  # of a decode in a round; their median counts


@dataclass(frozen=True, slots=True)
class Work:
    """What both are asked for.

    Attributes:
        how: the peer's implementation of attention, and whether it is compiled.
        kind: prefill or decode.
        tokens: of the prompt, or in the cache of each sequence.
        sequences: of a batch.
    """

    how: str
    kind: str
    tokens: int
    sequences: int = 1

    def rate(self, seconds: float) -> float:
        """Return tokens per second."""
        return (self.tokens if self.kind == "prefill" else self.sequences) / seconds


@dataclass(frozen=True, slots=True)
class Ours:
    """Our model, and how its prefills are cut."""

    model: GpuModel
    plan: Any

    def seconds(self, work: Work) -> float:
        """Return what it takes once."""
        if work.kind == "prefill":
            return self.model.prefill_s(work.tokens, self.plan)
        step_s = partial(self.model.decode_s, work.sequences, work.tokens, self.plan)
        return median(step_s() for _ in range(STEPS))


@dataclass(frozen=True, slots=True)
class Setting:
    """What the peer's process is started with.

    Attributes:
        shape: name of it. layers: how many. device: as torch calls it.
        limit_s: for all, from its start.
    """

    shape: str
    layers: int
    device: str
    limit_s: float


def works_of(
    attentions: Iterable[str], lengths: Iterable[int], decodes: Iterable[tuple[int, int]]
) -> list[Work]:
    """Return what is measured; last what compiles, which takes most of a minute.

    Args:
        decodes: (sequences, tokens in the cache of each).
    """
    prefills, batches = [n for n in lengths if n >= SHORTEST], list(decodes)
    found = []
    for how in attentions:
        found += [Work(how, "prefill", tokens) for tokens in prefills]
        found += [Work(how, "decode", context, sequences) for sequences, context in batches]
    how = f"sdpa{COMPILED}"
    found += [Work(how, "decode", context, n) for n, context in batches if n == 1]
    found += [Work(how, "prefill", n) for n in prefills if n in COMPILED_TOKENS]
    return found


class PeerError(Exception):
    """The peer gave no figure; says why."""


class Peer:
    """Its process; what is asked is answered by a deadline, or the process is ended.

    Attributes:
        name: with versions.
        attentions: its implementations of attention.
    """

    def __init__(self, setting: Setting) -> None:
        """Start it and wait until its model is there.

        Raises:
            PeerError: it ended, or was not ready in time.
        """
        self._limit_s = setting.limit_s
        self._deadline_s = time.monotonic() + setting.limit_s
        command = [sys.executable, "-m", CHILD, setting.shape, str(setting.layers), setting.device]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe)
        try:
            hello = self._answer()
        except PeerError:
            self.close()
            raise
        self.name: str = hello["name"]
        self.attentions: list[str] = hello["attentions"]

    def has(self, seconds: float) -> bool:
        """Return whether it can still be asked, for so long."""
        return self._process.poll() is None and self._deadline_s - time.monotonic() > seconds

    def seconds(self, work: Work) -> float:
        """Return what it took.

        Raises:
            PeerError: it could not, or not in time.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(asdict(work)).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the answer says how it ended
        return float(self._answer()["seconds"])

    def _answer(self) -> dict[str, Any]:
        out = self._process.stdout
        assert out is not None
        left_s = max(self._deadline_s - time.monotonic(), 0.0)
        if not select.select([out], [], [], left_s)[0]:
            self._process.kill()
            raise PeerError(f"no answer within the {self._limit_s:g} s for all")
        line = out.readline()  # written at once
        if not line:
            raise PeerError(f"its process ended with {self._process.wait(60)}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


def rows(
    setting: Setting, ours: Ours, lengths: Iterable[int], decodes: Iterable[tuple[int, int]]
) -> Iterator[Row]:
    """Measure both in turns; a row with `failure` where there is no figure.

    Args:
        decodes: (sequences, tokens in the cache of each).
    """
    try:
        peer = Peer(setting)
    except PeerError as error:
        yield {"failure": str(error)}
        return
    with closing(peer):
        for work in works_of(peer.attentions, lengths, decodes):
            row: Row = {"peer": peer.name} | asdict(work)
            if not peer.has(COMPILED_S if work.how.endswith(COMPILED) else EAGER_S):
                yield row | {"failure": "left out: no time, or its process has ended"}
                continue
            try:
                yield row | _measured(peer, ours, work)
            except PeerError as error:
                yield row | {"failure": str(error)}


def _measured(peer: Peer, ours: Ours, work: Work) -> Row:
    """Return the figures of both; what came first is not counted: kernels, graphs, compilation."""
    since_s = time.monotonic()
    peer.seconds(work)
    first_s = time.monotonic() - since_s
    for _ in range(2):  # ours captures graphs at a second launch
        ours.seconds(work)
    theirs_s, ours_s = [], []
    for _ in range(ROUNDS):
        ours_s.append(ours.seconds(work))
        theirs_s.append(peer.seconds(work))
    rate, rate_of_ours = work.rate(median(theirs_s)), work.rate(median(ours_s))
    return {
        "tokens_per_s": rate,
        "min": work.rate(max(theirs_s)),
        "max": work.rate(min(theirs_s)),
        "first_s": first_s,
        "flowprefill_tokens_per_s": rate_of_ours,
        "flowprefill_min": work.rate(max(ours_s)),
        "flowprefill_max": work.rate(min(ours_s)),
        "flowprefill_faster": rate_of_ours / rate,
    }
