"""Random JSON schemas and hand-made ones, and a small vocabulary of bytes and pieces of JSON."""

from __future__ import annotations

import random
from typing import Any

PIECES = (
    '{"', '"}', '":', '", "', "[[", "]]", "true", "false", "null", "\n  ", "12", "34", "ab", "item",
    '"name"', '"value"', '"kind"', "é", "\N{PARTY POPPER}", "-1", "0.5", "2026-", "\\n", '\\"',
)  # fmt: skip
TOKENS = (*(bytes([b]) for b in range(256)), *(p.encode() for p in PIECES), b"<bos>", b"<eos>")
VOCAB = len(TOKENS)
BOS, EOS = VOCAB - 2, VOCAB - 1


class PieceTokenizer:
    """What Grammars needs of a tokenizer."""

    bos_id, eos_ids, joins_words = BOS, (EOS,), False

    def token_bytes(self, token_id: int) -> bytes:
        return TOKENS[token_id]

    def is_special(self, token_id: int) -> bool:
        return token_id >= BOS

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())


def random_schema(seed: int) -> dict[str, Any]:
    """A satisfiable schema whose texts end soon at random."""
    return _schema(random.Random(seed), 3)


def _schema(rng: random.Random, depth: int) -> dict[str, Any]:
    leaves = (_string, _integer, _number, _enum, _simple)
    makers = (*leaves, _object, _object, _array, _union) if depth else leaves
    maker: Any = rng.choice(makers)
    made: dict[str, Any] = maker(rng, depth - 1)
    return made


def _string(rng: random.Random, depth: int) -> dict[str, Any]:
    pattern = rng.choice((None, None, "^[a-z]{2,5}$", "^\\d{3}-\\d{2}$", "^(yes|no|maybe)$"))
    if pattern is not None:
        return {"type": "string", "pattern": pattern}
    kind = rng.choice((None, None, None, "date", "uuid", "ipv4"))
    if kind is not None:
        return {"type": "string", "format": kind}
    low = rng.randrange(3)
    return {"type": "string", "minLength": low, "maxLength": low + rng.randrange(8)}


def _integer(rng: random.Random, depth: int) -> dict[str, Any]:
    low = rng.randrange(-500, 500)
    bounds = {"minimum": low, "maximum": low + rng.randrange(2000)}
    return {"type": "integer", **(bounds if rng.random() < 0.6 else {})}


def _number(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"type": "number", **({"minimum": 0, "maximum": 10} if rng.random() < 0.5 else {})}


def _enum(rng: random.Random, depth: int) -> dict[str, Any]:
    values = ["red", "grün", 'say "x"', 7, -1.5, None, True, [1, 2], {"a": 1}]
    return {"enum": rng.sample(values, rng.randrange(1, 5))}


def _simple(rng: random.Random, depth: int) -> dict[str, Any]:
    return rng.choice(({"type": "boolean"}, {"type": "null"}, {"const": rng.choice(("a", 1))}))


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(("name", "value", "kind", "a b", "ключ", "n", "items"), rng.randrange(1, 5))
    made: dict[str, Any] = {
        "type": "object",
        "properties": {name: _schema(rng, depth) for name in names},
        "required": [name for name in names if rng.random() < 0.6],
    }
    if rng.random() < 0.7:
        made["additionalProperties"] = False
    return made


def _array(rng: random.Random, depth: int) -> dict[str, Any]:
    low = rng.randrange(3)
    made: dict[str, Any] = {"type": "array", "items": _schema(rng, depth)}
    if rng.random() < 0.2:
        return {"type": "array", "prefixItems": [_schema(rng, depth), _schema(rng, depth)],
                "items": False, "minItems": 2}  # fmt: skip
    return {**made, "minItems": low, "maxItems": low + rng.randrange(3)}


def _union(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [_schema(rng, depth) for _ in range(rng.randrange(2, 4))]}


_TREE = {"type": "object", "properties": {"value": {"type": "integer", "maximum": 9, "minimum": 0},
         "left": {"anyOf": [{"$ref": "#/$defs/tree"}, {"type": "null"}]}},
         "required": ["value", "left"], "additionalProperties": False}  # fmt: skip
_SHAPE = {"type": "object", "properties": {"kind": {"const": "circle"}, "radius": {"type": "number",
          "minimum": 0, "maximum": 1}}, "required": ["kind", "radius"],
          "additionalProperties": False}  # fmt: skip
_SQUARE = {"type": "object", "properties": {"kind": {"const": "square"}, "side": {"type":
           "integer"}}, "required": ["kind", "side"], "additionalProperties": False}  # fmt: skip
_WORD = {"type": "string", "pattern": "^[a-z]{1,6}$"}

HAND_MADE: tuple[dict[str, Any], ...] = (
    {"$ref": "#/$defs/tree", "$defs": {"tree": _TREE}},
    {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2, "$defs": {"tree": _TREE}},
    {"anyOf": [_SHAPE, _SQUARE]},
    {"oneOf": [_SHAPE, _SQUARE]},
    {"type": "array", "items": {"anyOf": [_SHAPE, _SQUARE]}, "minItems": 1, "maxItems": 3},
    {"type": ["string", "null"], "maxLength": 5},
    {"type": ["integer", "boolean"]},
    {"type": "string", "pattern": "^[A-Z][a-z]+( [A-Z][a-z]+)?$"},
    {"type": "string", "pattern": "^\\+?[0-9]{2,4}(-[0-9]{2}){1,2}$"},
    {"type": "string", "pattern": "a.b", "maxLength": 6},
    {"type": "string", "format": "date-time"},
    {"type": "string", "format": "time"},
    {"type": "string", "format": "email"},
    {"type": "string", "format": "ipv6"},
    {"type": "number", "exclusiveMinimum": -1, "exclusiveMaximum": 1},
    {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 100},
    {"type": "number", "multipleOf": 0.25, "minimum": 0, "maximum": 2},
    {"type": "object", "additionalProperties": _WORD, "maxProperties": 2},
    {"type": "object", "properties": {"a": _WORD}, "required": ["a"],
     "additionalProperties": {"type": "integer"}},
    {"type": "object", "properties": {}, "additionalProperties": False},
    {"type": "object", "patternProperties": {"^x_[a-z]$": {"type": "boolean"}},
     "additionalProperties": False},
    {"allOf": [{"type": "object", "properties": {"a": _WORD}, "required": ["a"]},
               {"type": "object", "properties": {"b": {"type": "null"}}, "required": ["b"]}]},
    {"type": "array", "prefixItems": [_WORD, {"type": "integer"}], "items": False, "minItems": 2},
    {"type": "array", "items": {"type": "array", "items": {"type": "array", "items": _WORD,
     "maxItems": 2}, "maxItems": 2}, "maxItems": 2},
    {"enum": ["\"quoted\"", "back\\slash", "new\nline", "ünï", "\N{PARTY POPPER}"]},
    {"const": {"deep": [1, {"er": None}]}},
    {"title": "Tool", "description": "annotated", "type": "object", "properties": {
        "q": {**_WORD, "title": "Q", "description": "d", "default": "a", "examples": ["b"]}},
     "required": ["q"], "additionalProperties": False},
    {"$schema": "https://json-schema.org/draft/2020-12/schema", "$defs": {"n": {"type": "integer",
     "minimum": 1, "maximum": 3}}, "type": "object", "properties": {"n": {"$ref": "#/$defs/n"}},
     "required": ["n"], "additionalProperties": False},
    {"type": "object", "properties": {"a": {"anyOf": [{"type": "null"}, {"type": "object",
     "properties": {"b": {"enum": [1, 2]}}, "required": ["b"], "additionalProperties": False}]}},
     "required": ["a"], "additionalProperties": False},
    {"type": "string", "minLength": 3, "maxLength": 3},
)  # fmt: skip
