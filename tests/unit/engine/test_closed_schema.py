"""Which objects of a JSON schema are closed, and that closed ones mean nothing else."""

from __future__ import annotations

import copy
import json
from typing import Any

import jsonschema
import pytest
from test_structured_suite import generate

from flowprefill.engine.closed_schema import close_objects
from flowprefill.engine.grammars import Grammars
from flowprefill.request import StructuredOutput

DIGIT = {"enum": [1, 2]}


def an_object(*names: str, **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": dict.fromkeys(names, DIGIT), **more}


def kind_of(name: str, *others: str) -> dict[str, Any]:
    made = an_object(*others, required=["kind"])
    made["properties"]["kind"] = {"const": name}
    return made


def closed_places(schema: dict[str, Any]) -> list[str]:
    """Return the paths of objects that were closed."""
    made = json.loads(json.dumps(schema))
    close_objects(made)
    found = []

    def walk(before: Any, after: Any, path: str) -> None:
        if isinstance(after, dict):
            if "additionalProperties" in after and "additionalProperties" not in before:
                assert after["additionalProperties"] is False
                found.append(path)
            for key in before:
                walk(before[key], after[key], f"{path}/{key}")
        elif isinstance(after, list):
            for index, (one, other) in enumerate(zip(before, after, strict=True)):
                walk(one, other, f"{path}/{index}")
        else:
            assert before == after

    walk(schema, made, "")
    return sorted(found)


CLOSED: list[tuple[dict[str, Any], list[str]]] = [
    (an_object("a", required=["a"]), [""]),
    (an_object(), [""]),
    ({"type": "array", "items": an_object("a")}, ["/items"]),
    ({"type": "object", "properties": {"a": an_object("b")}}, ["", "/properties/a"]),
    ({"$ref": "#/$defs/t", "$defs": {"t": an_object("a")}}, ["/$defs/t"]),
    ({"allOf": [{"$ref": "#/definitions/t"}], "title": "T", "definitions": {"t": an_object("a")}},
     ["/definitions/t"]),
    ({"anyOf": [an_object("a"), {"type": "null"}]}, ["/anyOf/0"]),
    ({"oneOf": [kind_of("x", "a"), kind_of("y", "a", "b")]}, ["/oneOf/0", "/oneOf/1"]),
]  # fmt: skip
LEFT_OPEN: list[dict[str, Any]] = [
    {"type": "object"},
    an_object("a", additionalProperties=True),
    an_object("a", additionalProperties=DIGIT),
    an_object("a", unevaluatedProperties=False),
    an_object("a", patternProperties={"^x": DIGIT}),
    an_object("a", required=["b"]),
    an_object("a", minProperties=2),
    an_object("a", anyOf=[an_object("b"), an_object("c")]),
    {"allOf": [an_object("a"), an_object("b")]},
    {"allOf": [{"$ref": "#/$defs/t"}, an_object("b")], "$defs": {"t": an_object("a")}},
    {"allOf": [{"properties": {"a": an_object("b")}}, {"properties": {"a": an_object("c")}}]},
    {"$ref": "#/$defs/t", **an_object("b"), "$defs": {"t": an_object("a")}},
    {"oneOf": [an_object("a"), an_object("a", "b")]},
    {"not": an_object("a")},
    {"const": an_object("a"), "default": an_object("a"), "enum": [an_object("a")]},
]


@pytest.mark.parametrize(("schema", "places"), CLOSED)
def test_objects_that_list_their_properties_are_closed(
    schema: dict[str, Any], places: list[str]
) -> None:
    assert closed_places(schema) == places


@pytest.mark.parametrize("schema", LEFT_OPEN)
def test_what_is_joined_or_says_otherwise_is_left_open(schema: dict[str, Any]) -> None:
    assert closed_places(schema) == []


def test_a_definition_that_is_joined_anywhere_is_open_everywhere() -> None:
    inner = {"properties": {"x": {"$ref": "#/$defs/t"}}}
    schema = an_object()
    schema["$defs"] = {"t": an_object("a"), "u": inner}
    schema["properties"]["p"] = {"$ref": "#/$defs/t"}
    schema["properties"]["q"] = {"allOf": [{"$ref": "#/$defs/u"}, an_object("b")]}
    assert closed_places(schema) == [""]


def test_schemas_that_refer_to_themselves_end() -> None:
    tree = an_object("value")
    tree["properties"]["left"] = {"$ref": "#"}
    assert closed_places(tree) == [""]
    assert closed_places({"allOf": [tree, {"$ref": "#"}]}) == []
    nested: dict[str, Any] = {}
    for _ in range(5000):
        nested = {"items": nested}
    close_objects(nested)


NO_SCHEMAS: list[Any] = [
    True, None, [], {"properties": 1}, {"anyOf": {}, "$ref": 3},
    {"properties": {}, "required": [1], "minProperties": "x"},
    {"oneOf": [{"properties": [], "required": ["a"]}, 1]},
]  # fmt: skip


@pytest.mark.parametrize("schema", NO_SCHEMAS)
def test_what_is_no_schema_is_left_to_the_compiler(schema: Any) -> None:
    given = copy.deepcopy(schema)
    close_objects(given)
    assert given == schema


def test_closed_objects_end_soon_and_fulfil_what_was_given(grammars: Grammars) -> None:
    for seed, (given, _) in enumerate(CLOSED):
        schema = {**given, "maxItems": 3}
        texts = [generate(grammars, StructuredOutput.from_schema(schema), 50 * seed + i)
                 for i in range(4)]  # fmt: skip
        for text, _ in (one for one in texts if one[1]):
            jsonschema.Draft202012Validator(schema).validate(json.loads(text))
        assert all(has_ended for _, has_ended in texts), texts


def test_open_objects_stay_open(grammars: Grammars) -> None:
    wanted = StructuredOutput.from_schema(an_object("a", additionalProperties=DIGIT))
    texts = [generate(grammars, wanted, seed)[0] for seed in range(8)]
    assert any(set(json.loads(text)) - {"a"} for text in texts if text.endswith("}"))
