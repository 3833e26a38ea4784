"""why_slow: whether a tokenizer's pattern may take exponential time; asked by tokenizer_file.py.

The tokenizers library matches by trying (Oniguruma). A repetition inside a repetition, or a choice
inside one, can try every way to divide a text: 2^n for n characters. The patterns of real models
have none; each of their choices has two unbounded repetitions at most. So a pattern is refused by
its shape. What is let through takes O(n^(k + 1)) at most, k = MAX_REPEATS, and the library itself
gives up on a match after some ten million steps.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

MAX_CHARS = 4096
MAX_REPEATS = 3  # unbounded repetitions in one choice
MANY = 16  # a counted repetition up to so many is a bounded one
_COUNT = re.compile(r"\{(\d*)(,?)(\d*)\}")
_BACKWARD = re.compile(r"\\(?:[1-9]|[kg]<)")
_GROUP_HEAD = re.compile(r"\?(?:[:=!>|]|<[=!]|<[^>]*>|P<[^>]*>|[imsxa-]*:|#)?")


@dataclass(slots=True)
class _Group:
    """What is known of a group, or of the whole pattern, up to here.

    Attributes:
        repeats: unbounded repetitions in its present choice.
        most: the most of its choices so far.
        has_choice: there is more than one choice.
    """

    repeats: int = 0
    most: int = 0
    has_choice: bool = False

    def end_choice(self) -> None:
        """Begin another choice."""
        self.most = max(self.most, self.repeats)
        self.repeats = 0


def why_slow(pattern: object) -> str:
    """Return what makes a pattern one that may take for ever, in words; empty: it is fine.

    Args:
        pattern: as the file has it; what is no text is left to the library.
    """
    if not isinstance(pattern, str):
        return ""
    if len(pattern) > MAX_CHARS:
        return f"has {len(pattern)} characters, more than {MAX_CHARS}"
    if "(?R" in pattern or _BACKWARD.search(pattern.replace("\\\\", "")):
        return "refers back to a part of itself"
    return _scan(pattern)


def _scan(pattern: str) -> str:
    groups = [_Group()]
    ended: _Group | None = None  # the group that has ended just before
    at = 0
    while at < len(pattern):
        if groups[-1].repeats > MAX_REPEATS:
            break
        char = pattern[at]
        is_unbounded, after = _repetition(pattern, at)
        if after:
            if ended is not None and is_unbounded and (ended.most or ended.has_choice):
                return "repeats a group that holds a repetition or a choice"
            groups[-1].repeats += is_unbounded
            # `ended` stays: a repetition may follow another one.
            at = after
            continue
        ended = None
        if char == "\\":
            at += 2
        elif char == "[":
            at = _end_of_set(pattern, at)
        elif char == "(":
            groups.append(_Group())
            head = _GROUP_HEAD.match(pattern, at + 1)
            at = head.end() if head else at + 1
        elif char == ")" and len(groups) > 1:
            ended = groups.pop()
            ended.end_choice()
            groups[-1].repeats += ended.most
            groups[-1].has_choice |= ended.has_choice
            at += 1
        else:
            if char == "|":
                groups[-1].end_choice()
                groups[-1].has_choice = True
            at += 1
    if groups[-1].repeats > MAX_REPEATS:
        return f"has more than {MAX_REPEATS} unbounded repetitions in one choice"
    return ""


def _repetition(pattern: str, at: int) -> tuple[bool, int]:
    """Return whether an unbounded repetition stands here, and where it ends; 0: it is none."""
    if pattern[at] in "*+":
        return True, at + 1
    if pattern[at] == "?":
        return False, at + 1
    count = _COUNT.match(pattern, at)
    if count is None or not (count[1] or count[3]):
        return False, 0
    most = count[3] if count[2] else count[1]
    return not most or len(most) > 3 or int(most) > MANY, count.end()


def _end_of_set(pattern: str, at: int) -> int:
    """Return where a character set ends that begins here; sets may hold sets."""
    depth, first = 0, -1
    while at < len(pattern):
        char = pattern[at]
        if char == "\\":
            at += 1
        elif char == "[":
            depth += 1
            first = at + 1 + (pattern[at + 1 : at + 2] == "^")
        elif char == "]" and at != first:
            depth -= 1
            if depth == 0:
                return at + 1
        at += 1
    return at
