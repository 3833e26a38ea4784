"""Mutations of good files and bodies: bytes, JSON values, words; equal for equal random numbers."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable
from typing import Any

NUMBERS: list[Any] = [
    0, -1, 1, 2, 7, 255, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**63 - 1, 2**64, 10**30,
    -(2**63), 0.5, -0.0, 1e-300, 1e308, float("inf"), float("nan"),
]  # fmt: skip
TEXTS = [
    "", "a", "\x00", "\ud800", "\udc00x", "é", "\U0001f600", " " * 300, "a" * 5000, "../../x",
    "(a+)+b", "{{ 9 ** 9 ** 9 }}", "qwen2", "LlamaForCausalLM", "yarn", "BPE", "Sequence",
    "WordPiece", "Unigram", "ByteLevel", "null", "1e999", "text", "none", "auto", "%s%n",
]  # fmt: skip
BRANCHES: list[Any] = [None, True, False, [], {}, [[]], [None], [{}], {"": {}}, {"type": 7}]
WORDS = [
    "{{", "}}", "{%", "%}", "{#", "for", "in", "if", "else", "endif", "endfor", "range(9)", "~",
    "|", "tojson", "length", "loop.index", "namespace()", "messages", "messages[0]", ".content",
    "[", "]", "(", ")", "'", '"', "set x =", "x", "* 9", "** 9", "raise_exception('x')", "self",
    "__class__", "caller()", "macro", "include 'x'", "import 'x' as y", "bos_token", "none",
    "cycler(1)", "lipsum()", "recursive", "loop(messages)", "joiner", "do", "break", "0", "-1",
    "e", "\n",
]  # fmt: skip
# Whole statements, so that a template still compiles; the last ones take all the time they get.
STATEMENTS = [
    "{{ messages }}", "{{ messages[9].content }}", "{{ messages[0].role * 40 }}", "{{ {}['x'] }}",
    "{{ messages | map(attribute='content') | list | tojson }}", "{{ 1 / 0 }}",
    "{{ bos_token.x.y }}", "{{ raise_exception(messages) }}", "{% set ns.last = ns %}",
    "{{ turn(turn, turn) }}", "{% for a in range(9) recursive %}{{ loop(range(a)) }}{% endfor %}",
    "{{ messages.append(1) }}", "{{ ''.__class__.__mro__ }}", "{{ '%s' % messages }}",
    "{{ '{0.__class__}'.format(messages) }}", "{% generation %}x{% endgeneration %}",
    "{{ strftime_now('%Y') }}", "{{ '\\ud800' }}", "{% include 'x' %}",
    "{% call turn('a') %}b{% endcall %}", "{{ [1] | tojson(indent='x') }}",
    "{% set messages = 7 %}", "{{ namespace(a=namespace) }}", "{% break %}", "{{ self }}",
]  # fmt: skip
ENDLESS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'x' * 10**10 }}", "{{ 9 ** (9 ** 9) }}", "{{ range(10**9) | list }}",
]  # fmt: skip


def of_bytes(raw: bytes, rng: random.Random, head: int = 0) -> bytes:
    """Change some bytes: flip, cut, double, or put a length that is extreme; mostly in the head."""
    data = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 4))):
        most = len(data) if not head or rng.random() < 0.2 else min(head, len(data))
        at = rng.randrange(max(most, 1))
        match rng.randrange(6):
            case 0:
                data[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                del data[at : at + rng.choice((1, 4, 8, 64, 4096))]
            case 2:
                data[at:at] = data[at : at + rng.choice((1, 8, 64))]
            case 3:
                value = rng.choice(
                    (0, 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1, rng.getrandbits(64))
                )
                data[at : at + 8] = struct.pack("<Q", value)
            case 4:
                data[at : at + 4] = struct.pack(
                    "<I", rng.choice((0, 1, 8, 9, 12, 99, 2**31, 2**32 - 1))
                )
            case _:
                data = data[:at] if rng.random() < 0.5 else data + data[at:]
    return bytes(data)


def of_value(value: Any, rng: random.Random) -> Any:
    """Change a JSON value in one to three places."""
    changed = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 2, 3))):
        changed = _changed(changed, rng)
    return changed


def of_json(raw: bytes, rng: random.Random) -> bytes:
    """Change a JSON text: mostly its values, sometimes its bytes."""
    chance = rng.random()
    if chance < 0.2:
        return of_bytes(raw, rng)
    if chance < 0.22:  # deeper than any parser goes
        return rng.choice((b"[", b'{"a":', b'{"model":{"vocab":[')) * rng.choice((900, 100_000))
    changed = of_value(json.loads(raw), rng)
    return json.dumps(changed, ensure_ascii=rng.random() < 0.5).encode(errors="surrogatepass")


def of_safetensors(raw: bytes, rng: random.Random) -> bytes:
    """Change the header's JSON, or bytes of the head."""
    if rng.random() < 0.4:
        return of_bytes(raw, rng, head=64)
    size = int.from_bytes(raw[:8], "little")
    header = of_json(raw[8 : 8 + size], rng)
    length = len(header) if rng.random() < 0.9 else rng.choice((0, 2**32, 2**63, 2**64 - 1))
    return length.to_bytes(8, "little") + header + raw[8 + size :]


def of_gguf(raw: bytes, rng: random.Random) -> bytes:
    """Change bytes, mostly of the metadata."""
    return of_bytes(raw, rng, head=2600)


def of_template(raw: bytes, rng: random.Random) -> bytes:
    """Put statements into a template, or put, take out and exchange pieces of it."""
    chance = rng.random()
    if chance < 0.05:
        return of_bytes(raw, rng)
    if chance < 0.6:
        lines = raw.decode().splitlines()
        for _ in range(rng.choice((1, 2))):
            wanted = ENDLESS if rng.random() < 0.02 else STATEMENTS
            lines.insert(rng.randrange(len(lines) + 1), rng.choice(wanted))
        return "\n".join(lines).encode()
    pieces = (
        raw.decode().replace("{", "\x01{").replace("}", "}\x01").replace(" ", "\x01 ").split("\x01")
    )
    for _ in range(rng.choice((1, 2, 4, 8))):
        at = rng.randrange(len(pieces) or 1)
        match rng.randrange(4):
            case 0:
                pieces[at:at] = [" ", rng.choice(WORDS), " "]
            case 1:
                del pieces[at : at + rng.choice((1, 1, 4))]
            case 2:
                pieces[at : at + 1] = [rng.choice(WORDS)]
            case _:
                pieces[at:at] = pieces[rng.randrange(len(pieces) or 1) :][: rng.choice((1, 8))]
    return "".join(pieces).encode()


Mutation = Callable[[bytes, random.Random], bytes]


def _changed(value: Any, rng: random.Random) -> Any:
    """Walk to some place in the value and put, take out or replace there."""
    is_branch = isinstance(value, (dict, list)) and value
    if not is_branch or rng.random() < 0.1:
        return _fresh(rng, value)
    keys: list[Any] = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = rng.choice(keys[:40])
    chance = rng.random()
    if chance < 0.1:
        del value[key]
    elif chance < 0.2 and isinstance(value, dict):
        value[rng.choice(TEXTS[:12])] = value[key]
    elif chance < 0.2:
        value.extend(copy.deepcopy(value[: rng.choice((1, 50))]))
    else:
        value[key] = _changed(value[key], rng)
    return value


def _fresh(rng: random.Random, old: Any) -> Any:
    chance = rng.random()
    if chance < 0.05:
        deep: Any = old
        for _ in range(rng.choice((3, 20, 60))):
            deep = [deep]
        return deep
    if chance < 0.1 and isinstance(old, str):
        return old[: len(old) // 2] + rng.choice(TEXTS) + old[len(old) // 2 :]
    return copy.deepcopy(rng.choice(rng.choice((NUMBERS, TEXTS, BRANCHES))))
