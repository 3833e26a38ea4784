"""Closes the objects of JSON schemas, so that a model adds no properties; the grammars ask.

JSON schema lets an object have any property unless `additionalProperties` forbids it. A small model
goes on to invent some until its tokens run out, and hardly anyone who lists properties wants that.
What fulfils the closed schema must fulfil the given one, and it must stay satisfiable. So an object
is left open where it is joined with others, or where being narrower could make something else true.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

ANNOTATIONS = {
    "$schema", "$id", "$comment", "$defs", "definitions", "title", "description", "default",
    "examples", "deprecated", "readOnly", "writeOnly", "discriminator", "x-guidance", "type",
}  # fmt: skip
JOINING = {
    "$ref", "$dynamicRef", "allOf", "anyOf", "oneOf", "not", "if", "then", "else",
    "dependentSchemas",
}  # fmt: skip
SAID = {"additionalProperties", "unevaluatedProperties", "patternProperties", "propertyNames"}
APPLIED = ("items", "prefixItems", "additionalProperties")  # to values of their own
NARROWING = (  # what is narrower there may make the whole wider, or is joined with the whole
    "not", "if", "then", "else", "contains", "propertyNames", "dependentSchemas",
    "unevaluatedProperties", "unevaluatedItems",
)  # fmt: skip


def close_objects(schema: Any) -> None:
    """Give objects that list their properties `additionalProperties: false`, in place.

    Args:
        schema: as parsed from JSON, no part of it twice in the tree. Where it is no schema, nothing
            is done: the compiler says what is wrong.
    """
    parts: dict[int, dict[str, Any]] = {}
    open_parts: set[int] = set()
    todo: list[tuple[Any, bool]] = [(schema, False)]
    while todo:
        part, is_joined = todo.pop()
        if not isinstance(part, dict):
            continue
        if id(part) in parts and (not is_joined or id(part) in open_parts):
            continue
        parts[id(part)] = part
        if is_joined:
            open_parts.add(id(part))
        todo += _parts_of(part, is_joined, schema)
    for number, part in parts.items():
        if number not in open_parts and _is_closable(part):
            part["additionalProperties"] = False


def _is_closable(part: dict[str, Any]) -> bool:
    properties, required = part.get("properties"), part.get("required", [])
    if not isinstance(properties, dict) or not isinstance(required, list):
        return False
    least = part.get("minProperties", 0)
    return (
        not (SAID | JOINING) & part.keys()
        and all(name in properties for name in required if isinstance(name, str))
        and isinstance(least, (int, float))
        and least <= len(properties)
    )


def _parts_of(part: dict[str, Any], is_joined: bool, root: Any) -> Iterator[tuple[Any, bool]]:
    """Yield the schemas in it, and whether each is joined with others."""
    own = part.keys() - ANNOTATIONS
    joins = is_joined or (len(own) > 1 and bool(own & JOINING))
    for key in ("$defs", "definitions"):
        for inner in _values(part.get(key)):
            yield inner, False
    both = "patternProperties" in part and "properties" in part  # one name may match both
    for key in ("properties", "patternProperties"):
        for inner in _values(part.get(key)):
            yield inner, joins or both
    for key in APPLIED:
        for inner in _listed(part.get(key)):
            yield inner, joins
    for key in NARROWING:
        value = part.get(key)
        for inner in _values(value) if key == "dependentSchemas" else _listed(value):
            yield inner, True
    for key in ("anyOf", "allOf", "oneOf"):
        inners = _listed(part.get(key))
        is_merged = (key == "allOf" and len(inners) > 1) or (
            key == "oneOf" and not _are_told_apart([_resolved(inner, root) for inner in inners])
        )
        for inner in inners:
            yield inner, joins or is_merged
    if isinstance(part.get("$ref"), str):
        yield _target(part["$ref"], root), joins


def _are_told_apart(inners: list[Any]) -> bool:
    """Whether a required property with different constants tells them apart, closed or not."""
    if not all(isinstance(inner, dict) for inner in inners):
        return False
    names = set.intersection(*(set(_required(inner)) for inner in inners)) if inners else set()
    for name in names:
        asked = [inner["properties"].get(name) for inner in inners]
        constants = [one.get("const") if isinstance(one, dict) else None for one in asked]
        texts = {constant for constant in constants if isinstance(constant, str)}
        if len(texts) == len(inners):
            return True
    return False


def _required(part: dict[str, Any]) -> list[str]:
    required = part.get("required")
    listed = required if isinstance(required, list) else []
    is_object = isinstance(part.get("properties"), dict)
    return [name for name in listed if isinstance(name, str)] if is_object else []


def _resolved(part: Any, root: Any) -> Any:
    if isinstance(part, dict) and isinstance(part.get("$ref"), str):
        return _target(part["$ref"], root)
    return part


def _target(reference: str, root: Any) -> Any:
    """Return what a reference into this schema points to; None for any other."""
    if not reference.startswith("#"):
        return None
    found = root
    for step in reference[1:].split("/")[1:]:
        name = step.replace("~1", "/").replace("~0", "~")
        if not isinstance(found, dict) or name not in found:
            return None
        found = found[name]
    return found


def _values(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else []


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
